"""Gradual pruning in loops of every kind: exact sparsities, zeros that stay, and a state to go on from."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.core.errors import (
    ArtifactError,
    BudgetError,
    MaskError,
    PatternError,
    ScheduleError,
    SecateurError,
)
from secateur.core.topk import count


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, 6, generator=g), torch.randint(0, 3, (16,), generator=g)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


BATCHES = [data(1000 + i) for i in range(2)]


# ------ what is pruned


def test_every_change_has_the_sparsity_of_the_schedule_and_nothing_comes_back():
    model = net()
    schedule = sc.cubic(0.1, 0.9, begin=3, end=20)
    gmp = sc.Gradual(model, sc.Magnitude(), schedule, when=sc.every(5), allocation=sc.global_)
    optimizer, seen = adamw(model), [gmp.masks]
    with gmp.attach(optimizer):
        for step in range(25):
            train(model, optimizer, 1, step)
            seen.append(gmp.masks)
            gmp.masks.check(model)
    entries = seen[0].entries
    assert [c.step for c in gmp.history] == [3, 8, 13, 18, 20]
    for change in gmp.history:
        assert change.asked == schedule(change.step)
        removed = count(change.asked, entries)
        assert seen[change.step].entries - seen[change.step].kept == removed
        assert change.sparsity == removed / entries
        assert change.layers == seen[change.step].by_layer()
        assert change.moved == seen[change.step - 1].kept - seen[change.step].kept
    assert all(later <= earlier for earlier, later in itertools.pairwise(seen))
    assert seen[2].sparsity == 0 and seen[-1] == gmp.masks


def test_one_step_is_prune_():
    """At each change the masks are those that one-shot pruning of the same weights would choose."""
    model = net()
    gmp = sc.Gradual(model, sc.Magnitude(), sc.linear(0.2, 0.6, begin=4, end=6), when=sc.every(2))
    optimizer = adamw(model)
    with gmp.attach(optimizer):
        train(model, optimizer, 4)
        twin = copy.deepcopy(model)
        assert sc.prune_(twin, sc.Magnitude(), 0.2).masks == gmp.masks
        state = copy.deepcopy(optimizer.state_dict())
        other = adamw(twin)
        other.load_state_dict(state)
        with gmp.masks.hold(twin, other):
            train(twin, other, 2, 4)
        train(model, optimizer, 2, 4)
        # The weights of the last step were pruned further; before that they are the same.
        assert sc.prune_(twin, sc.Magnitude(), 0.6).masks == gmp.masks
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "criterion", [sc.Taylor(), sc.OBD(), sc.Wanda(), sc.Random(), sc.SNIP()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("allocation", [sc.uniform, sc.global_, sc.erk], ids=lambda a: a.__name__)
def test_criteria_with_data_and_allocations(criterion, allocation):
    model = net()
    gmp = sc.Gradual(
        model,
        criterion,
        sc.cubic(0, 0.7, begin=2, end=9),
        when=sc.every(3),
        allocation=allocation,
        batches=BATCHES,
        loss=F.cross_entropy,
    )
    optimizer = adamw(model)
    with gmp.attach(optimizer, steps=10):
        train(model, optimizer, 10)
    assert gmp.masks.entries - gmp.masks.kept == count(0.7, gmp.masks.entries)
    assert gmp.report().sparsity == gmp.masks.sparsity


@pytest.mark.parametrize("pattern", [sc.NM(2, 4), sc.NM(1, 4), sc.Block(4, 2), sc.PerRow()], ids=repr)
def test_patterns_hold_at_the_end_and_sparsities_on_the_way(pattern):
    model = net()
    final = 0.75 if pattern == sc.NM(1, 4) else 0.5
    schedule = sc.cubic(0, final, begin=0, end=12)
    gmp = sc.Gradual(model, sc.Magnitude(), schedule, when=sc.every(4), pattern=pattern)
    optimizer = adamw(model)
    with gmp.attach(optimizer):
        train(model, optimizer, 12)
    for t in sc.select(model).targets:
        keep = t.layout.matrix(gmp.masks[t.name])
        if isinstance(pattern, sc.NM):
            assert (keep.reshape(-1, pattern.m).sum(1) == pattern.n).all()
        elif isinstance(pattern, sc.Block):
            tiles = keep.reshape(keep.shape[0] // 4, 4, -1, 2).float().mean(dim=(1, 3))
            assert set(tiles.unique().tolist()) <= {0.0, 1.0}
        else:
            assert keep.sum(1).max() - keep.sum(1).min() <= 1
    unit = pattern.unit
    for change in gmp.history:
        assert change.sparsity == pytest.approx(change.asked, abs=(unit + 1) / gmp.masks.entries)
    assert len(gmp.history) == 4 and gmp.history[1].sparsity < final


@settings(max_examples=15)
@given(begin=st.integers(0, 6), length=st.integers(0, 12), interval=st.integers(1, 20), final=st.floats(0, 1))
def test_the_final_sparsity_is_exact_for_any_schedule(begin, length, interval, final):
    model = net()
    schedule = sc.linear(0, final, begin=begin, end=begin + length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.CollapseWarning)  # a sparsity of 1 empties every layer
        gmp = sc.Gradual(model, sc.Magnitude(), schedule, when=sc.every(interval))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with gmp.attach(optimizer):
            train(model, optimizer, begin + length)
    assert gmp.masks.entries - gmp.masks.kept == count(final, gmp.masks.entries)


# ------ loops


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    gmp = sc.Gradual(model, sc.Magnitude(), sc.linear(0, 0.5, begin=2, end=4), when=sc.every(1))
    with gmp.attach(optimizer):
        for step in range(6):
            x, y = data(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (math.inf if step in (1, 3) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert gmp.step == {0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 5: 4}[step]
    assert gmp.masks.sparsity == 0.5


def test_accumulated_batches_are_one_step():
    model = net()
    optimizer = adamw(model)
    gmp = sc.Gradual(model, sc.Magnitude(), sc.linear(0, 0.5, begin=1, end=3), when=sc.every(1))
    with gmp.attach(optimizer):
        for i in range(12):
            x, y = data(i)
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert gmp.step == 3 and gmp.masks.sparsity == 0.5


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    def fresh():
        model = net()
        gmp = sc.Gradual(
            model,
            sc.Taylor(),
            sc.cubic(0, 0.8, begin=2, end=17),
            when=sc.every(3),
            allocation=sc.global_,
            batches=BATCHES,
            loss=F.cross_entropy,
        )
        return model, adamw(model), gmp

    whole, optimizer, gmp = fresh()
    with gmp.attach(optimizer):
        train(whole, optimizer, 20)

    for stop in (0, 1, 5, 17):
        model, optimizer, first = fresh()
        attached = first.attach(optimizer)
        train(model, optimizer, stop)
        attached.release()
        parts = {"model": model, "optimizer": optimizer, "pruning": first}
        torch.save({k: v.state_dict() for k, v in parts.items()}, tmp_path / "state.pt")
        again, optimizer, second = fresh()
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        second.load_state_dict(state["pruning"])
        with second.attach(optimizer):
            train(again, optimizer, 20 - stop, stop)
        assert second.masks == gmp.masks and second.history == gmp.history and second.step == 20
        for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), (stop, name)


def test_averages_of_the_weights_have_the_same_zeros():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    own = copy.deepcopy(model)
    optimizer = adamw(model)
    gmp = sc.Gradual(model, sc.Magnitude(), sc.linear(0, 0.6, begin=1, end=6), when=sc.every(2))
    with gmp.attach(optimizer, copies=[average, own]):
        for step in range(8):
            train(model, optimizer, 1, step)
            average.update_parameters(model)
            with torch.no_grad():
                for a, b in zip(own.parameters(), model.parameters(), strict=True):
                    a.lerp_(b, 0.1)
    gmp.masks.check(average.module)
    gmp.masks.check(own)
    assert sc.Masks.of(own) == gmp.masks


def test_an_optimizer_that_mixes_entries_never_sees_what_is_gone():
    """Muon orthogonalises the gradient as a whole: entries of weights that are gone would move the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    half = sc.one_shot(0.5)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.05)
    gmp = sc.Gradual(model, sc.Magnitude(), half, where=sc.Where(also="2"))
    x = torch.randn(16, 8)
    seen = []
    with gmp.attach(optimizer):
        optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in model.parameters()]))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    masks = list(gmp.masks.values())
    for grads in seen:
        for grad, mask in zip(grads, masks, strict=True):
            assert not grad[~mask].any() and grad[mask].any()
    # Plain optimizers keep their gradients dense.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gmp = sc.Gradual(model, sc.Magnitude(), half, where=sc.Where(also="2"))
    with gmp.attach(optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad[~m].any() for p, m in zip(model.parameters(), masks, strict=True))


def test_compiled_models_and_replaced_parameters():
    model = net()
    compiled = torch.compile(model, backend="eager")
    gmp = sc.Gradual(compiled, sc.Magnitude(), sc.linear(0, 0.5, begin=0, end=4), when=sc.every(2))
    optimizer = adamw(model)
    with gmp.attach(optimizer):
        train(compiled, optimizer, 4)
        model[3].weight = nn.Parameter(torch.ones_like(model[3].weight))  # as loading with assign=True does
        train(compiled, optimizer, 1)
        gmp.masks.check(model)
    assert sc.Masks.of(model) == gmp.masks


# ------ what goes wrong


def test_a_training_that_is_too_short_raises():
    model = net()
    gmp = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.9, begin=0, end=10))
    optimizer = adamw(model)
    with pytest.raises(ScheduleError, match=r"ends at step 10, but training takes 9 steps"):
        gmp.attach(optimizer, steps=9)
    with pytest.raises(ScheduleError, match=r"ended at step 4"), gmp.attach(optimizer):
        train(model, optimizer, 4)
    with pytest.raises(ZeroDivisionError), gmp.attach(optimizer):  # the first error is the one to see
        _ = 1 / 0
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert gmp.step == 4  # no hook is left behind
    assert not torch.equal(before[0], model[0].weight)


def test_settings_that_cannot_work_fail_before_training():
    model = net()
    before = copy.deepcopy(model.state_dict())
    rise = sc.cubic(0, 0.9, begin=0, end=10)
    with pytest.raises(SecateurError, match="class"):
        sc.Gradual(model, sc.Magnitude, rise)
    with pytest.raises(SecateurError, match="batches"):
        sc.Gradual(model, sc.Taylor(), rise)
    with pytest.raises(PatternError, match="multiple of 5"):
        sc.Gradual(model, sc.Magnitude(), rise, pattern=sc.NM(2, 5))
    with pytest.raises(PatternError, match=r"removes at least 0\.5"):
        sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.4, begin=0, end=1), pattern=sc.NM(2, 4))
    with pytest.raises(BudgetError, match="can go"):
        sc.Gradual(model, sc.Magnitude(), rise, allocation=sc.at_least(sc.global_, 0.2))
    with pytest.raises(MaskError, match="optimizer of this model"):
        sc.Gradual(model, sc.Magnitude(), rise).attach(adamw(net()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_method_is_attached_once():
    model = net()
    gmp = sc.Gradual(model, sc.Magnitude(), sc.one_shot(0.5))
    optimizer = adamw(model)
    first = gmp.attach(optimizer)
    with pytest.raises(MaskError, match="attached to an optimizer already"):
        gmp.attach(optimizer)
    first.release()
    gmp.attach(optimizer).release()


def test_an_optimizer_that_evaluates_several_times():
    """LBFGS calls the closure again and again within one step."""

    def step(method_of):
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        method = method_of(model)

        def closure():
            optimizer.zero_grad()
            x, y = data(0)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        with method.attach(optimizer):
            for _ in range(3):
                optimizer.step(closure)
        return method

    gmp = step(lambda m: sc.Gradual(m, sc.Magnitude(), sc.linear(0.2, 0.5, begin=1, end=3), when=sc.every(1)))
    assert gmp.step == 3 and gmp.masks.sparsity == 0.5
    with pytest.raises(MaskError, match="LBFGS evaluates the loss several times"):
        step(lambda m: sc.Movement(m, sc.linear(0.2, 0.5, begin=1, end=3)))


def test_a_falling_schedule_raises_before_anything_comes_back():
    model = net()
    gmp = sc.Gradual(model, sc.Magnitude(), sc.linear(0.6, 0.2, begin=1, end=3), when=sc.every(1))
    optimizer = adamw(model)
    with pytest.raises(ScheduleError, match="falls from"), gmp.attach(optimizer):
        train(model, optimizer, 3)
    assert gmp.masks.sparsity == pytest.approx(0.6, abs=1e-3)


def test_states_of_something_else_are_refused():
    model = net()
    schedule = sc.cubic(0, 0.9, begin=0, end=10)
    gmp = sc.Gradual(model, sc.Magnitude(), schedule)
    state = gmp.state_dict()
    with pytest.raises(ArtifactError, match="not the state"):
        gmp.load_state_dict({"step": 3})
    with pytest.raises(ArtifactError, match="allocation"):
        sc.Gradual(model, sc.Magnitude(), schedule, allocation=sc.erk).load_state_dict(state)
    with pytest.raises(MaskError):
        sc.Gradual(nn.Sequential(net(), nn.Tanh()), sc.Magnitude(), schedule).load_state_dict(state)
    wrong = {**state, "masks": {k: m[:1] for k, m in state["masks"].items()}}
    with pytest.raises(MaskError, match="must be boolean"):
        gmp.load_state_dict(wrong)


def test_a_layer_that_empties_is_said_once_and_can_be_spared():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    rise = sc.linear(0.3, 0.9, begin=0, end=4)
    gmp = sc.Gradual(model, sc.Magnitude(), rise, when=sc.every(1), allocation=sc.global_)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    emptied = pytest.warns(sc.CollapseWarning, match=r"0\.weight has no weight left")
    with emptied as caught, gmp.attach(optimizer):
        train(model, optimizer, 4)
    assert len(caught) == 1
    assert any("0.weight has no weight left" in note for note in gmp.report().notes)

    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    spared = sc.at_least(sc.global_, 0.05)
    gmp = sc.Gradual(model, sc.Magnitude(), rise, when=sc.every(1), allocation=spared)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gmp.attach(optimizer):
        train(model, optimizer, 4)
    kept = {n: int(m.count_nonzero()) for n, m in gmp.masks.items()}
    assert kept["0.weight"] == math.ceil(0.05 * 96)
    assert gmp.masks.entries - gmp.masks.kept == count(0.9, gmp.masks.entries)


def test_the_report_tells_the_course():
    model = net()
    gmp = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.5, begin=0, end=6), when=sc.every(2))
    optimizer = adamw(model)
    with gmp.attach(optimizer):
        train(model, optimizer, 6)
    report = gmp.report()
    assert report.before.nonzero > report.after.nonzero
    assert [c["step"] for c in report.to_dict()["history"]] == [0, 2, 4, 6]
    assert "50.00%" in str(report)
    assert report.settings["schedule"].startswith("Polynomial(initial=0, final=0.5")
