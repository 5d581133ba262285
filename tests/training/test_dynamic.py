"""Dynamic sparse training: exact counts, dense gradients, fresh optimizer states, as the papers say."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.errors import ScheduleError, SecateurError, StatsError
from secateur.core.topk import count


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3)
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, 6, generator=g), torch.randint(0, 3, (16,), generator=g)


def backward(model: nn.Module, step: int) -> None:
    x, y = data(step)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.003),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=0.05),
}


def textbook_rigl(weight, gradient, keep, fraction, step, end):
    """Algorithm 1 of the paper, entry by entry: the new mask, and which entries start at zero."""
    w, g, m = (t.reshape(-1).tolist() for t in (weight, gradient, keep))
    active = [i for i in range(len(w)) if m[i]]
    k = int(fraction / 2 * (1 + math.cos(step * math.pi / end)) * len(active))
    kept = set(active) - set(sorted(active, key=lambda i: abs(w[i]))[:k])
    others = sorted((i for i in range(len(w)) if i not in kept), key=lambda i: -abs(g[i]))
    new = kept | set(others[:k])
    mask = torch.tensor([i in new for i in range(len(w))]).view(weight.shape)
    return mask, mask & ~keep


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rigl_is_algorithm_1_of_the_paper(kind):
    model = net()
    where = sc.Where(include="3") if kind == "muon" else None
    rigl = sc.Dynamic(model, sc.RigL(0.4), 0.8, end=9, when=sc.every(3), where=where)
    optimizer = OPTIMIZERS[kind](model.parameters())
    named = dict(model.named_parameters())
    with rigl.attach(optimizer):
        counts = {n: int(m.count_nonzero()) for n, m in rigl.masks.items()}
        for step in range(1, 14):
            masks = rigl.masks
            backward(model, step)
            gradients = {n: named[n].grad.clone() for n in masks}
            before = {n: p.detach().clone() for n, p in named.items()}
            state = copy.deepcopy({n: optimizer.state.get(p, {}) for n, p in named.items()})
            optimizer.step()
            assert {n: int(m.count_nonzero()) for n, m in rigl.masks.items()} == counts
            rigl.masks.check(model)
            assert all(torch.equal(named[n].grad, g) for n, g in gradients.items() if kind != "muon")
            if step not in (3, 6, 9):
                assert rigl.masks == masks
                continue
            # No weight is trained in this step, neither pruned layers' nor others.
            assert all(torch.equal(named[n], before[n]) for n in named if n not in masks)
            for name in masks:
                keep, new = textbook_rigl(before[name], gradients[name], masks[name], 0.4, step, 9)
                assert torch.equal(rigl.masks[name], keep), (step, name)
                expected = torch.where(keep & ~new, before[name], torch.zeros(()))
                assert torch.equal(named[name].detach(), expected), (step, name)
                for key, value in optimizer.state[named[name]].items():
                    if torch.is_tensor(value) and value.shape == keep.shape:
                        fresh = {"sum": 0.1, "step_size": 0.003}.get(key, 0.0)
                        assert (value[new] == fresh).all(), key
                        assert torch.equal(value[~new], state[name][key][~new]), key
    moved = {c.step: c.moved for c in rigl.history}
    assert list(moved) == [0, 3, 6, 9]
    assert moved[3] > 0 and moved[9] == 0  # the share of weights to exchange falls to nothing


def test_growth_reads_dense_gradients():
    """Where active weights alone had gradients, none of the others could ever be grown."""
    model = net()
    rigl = sc.Dynamic(model, sc.RigL(), 0.9, end=100, when=sc.every(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = rigl._first
    with rigl.attach(optimizer):
        train(model, optimizer, 20)
    for name, keep in rigl.masks.items():
        assert (keep & ~first[name]).any(), name


def test_erk_densities_and_sparsity_are_exact_throughout():
    model = net()
    rigl = sc.Dynamic(model, sc.SET(), 0.75, end=50, when=sc.every(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with rigl.attach(optimizer):
        train(model, optimizer, 20)
    removed = count(0.75, rigl.masks.entries)
    assert all(c.sparsity == removed / rigl.masks.entries for c in rigl.history)
    assert len({tuple(c.layers.items()) for c in rigl.history}) == 1
    sparsities = rigl.masks.by_layer()
    # Densities are as (sum of dimensions) over (their product): 15 / 96 and 56 / 768.
    assert (1 - sparsities["0.weight"]) / (1 - sparsities["3.weight"]) == pytest.approx(
        15 / 96 / (56 / 768), rel=0.05
    )


def test_set_drops_by_sign_and_grows_at_random_with_fresh_values():
    rule = sc.SET(0.3)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 30, generator=g)
    keep = torch.rand(20, 30, generator=g) < 0.4
    weight[~keep] = 0
    found = rule(weight, weight, keep, 0.5, torch.Generator().manual_seed(1))
    assert found.keep.count_nonzero() == keep.count_nonzero()
    kept = found.keep & ~found.new
    for sign in (1, -1):
        side = keep & (weight.sign() == sign)
        n, stay = int(side.count_nonzero()), int((side & kept).count_nonzero())
        assert n - stay == int(0.3 * n)
        gone = (side & ~kept).nonzero(as_tuple=True)
        assert weight[gone].abs().max() <= weight[side & kept].abs().min()
    assert found.new.count_nonzero() == (keep & ~kept).count_nonzero()
    values = found.values[found.new]
    assert values.abs().max() <= 1 / math.sqrt(30) and values.std() > 0.4 / math.sqrt(30)
    # The same draws from the same generator, others from another.
    again = rule(weight, weight, keep, 0.5, torch.Generator().manual_seed(1))
    other = rule(weight, weight, keep, 0.5, torch.Generator().manual_seed(2))
    assert torch.equal(again.keep, found.keep) and not torch.equal(other.keep, found.keep)


def test_set_trains_in_every_step():
    model, plain = net(), net()
    dynamic = sc.Dynamic(model, sc.SET(0.0), 0.0, end=10, when=sc.every(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with dynamic.attach(optimizer):
        train(model, optimizer, 5)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("rule", [sc.RigL(), sc.SET()], ids=repr)
def test_resumed_is_uninterrupted_bit_for_bit(rule):
    def fresh():
        model = net()
        dynamic = sc.Dynamic(model, rule, 0.8, end=15, when=sc.every(4), seed=3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), dynamic

    whole, optimizer, dynamic = fresh()
    with dynamic.attach(optimizer):
        train(whole, optimizer, 18)
    for stop in (0, 3, 4, 16):
        model, optimizer, first = fresh()
        attached = first.attach(optimizer)
        train(model, optimizer, stop)
        attached.release()
        state = copy.deepcopy([x.state_dict() for x in (model, optimizer, first)])
        again, optimizer, second = fresh()
        for x, s in zip((again, optimizer, second), state, strict=True):
            x.load_state_dict(s)
        with second.attach(optimizer):
            train(again, optimizer, 18 - stop, stop)
        assert second.masks == dynamic.masks
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_what_goes_wrong():
    model = net()
    with pytest.raises(SecateurError, match="fraction"):
        sc.RigL(1.5)
    with pytest.raises(ScheduleError, match="end is the last step"):
        sc.Dynamic(model, sc.RigL(), 0.9, end=-1)
    with pytest.raises(SecateurError, match="class"):
        sc.Dynamic(model, sc.RigL, 0.9, end=3)
    model[0].weight.requires_grad_(False)
    rigl = sc.Dynamic(model, sc.RigL(), 0.9, end=3, when=sc.every(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(StatsError, match=r"0\.weight has no gradient at step 1"), rigl.attach(optimizer):
        train(model, optimizer, 1)


# ------ AC/DC


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_acdc_takes_turns(kind):
    model = net()
    plan = sc.phases(begin=2, period=3, dense_from=8, sparse_from=12)  # sparse 2-4, dense 5-11, sparse 12-
    acdc = sc.ACDC(model, sc.Magnitude(), 0.7, plan)
    optimizer = OPTIMIZERS[kind](model.parameters())
    removed = count(0.7, acdc.masks.entries)
    zeros, last = [], None
    with acdc.attach(optimizer):
        for step in range(1, 16):
            train(model, optimizer, 1, step)
            acdc.masks.check(model)
            zeros.append(acdc.masks.entries - acdc.masks.kept)
            if step == 4:
                last = acdc.masks
            if step == 5:  # weights come back from zero, without a past
                acdc_zero = {n: (model.get_parameter(n) == 0) for n in last}
                for name, mask in last.items():
                    assert torch.equal(acdc_zero[name], ~mask)
                    for value in optimizer.state[model.get_parameter(name)].values():
                        if value.shape == mask.shape:
                            assert not value[~mask].any() and value[mask].any()
    assert plan.switches == (2, 5, 12)
    assert zeros == [0, removed, removed, removed, *[0] * 7, *[removed] * 4]
    masks = [c for c in acdc.history if c.sparsity]
    assert len(masks) == 2
    # The first mask is that of global magnitude pruning.
    twin = net()
    train(twin, OPTIMIZERS[kind](twin.parameters()), 2, 1)
    assert sc.prune_(twin, sc.Magnitude(), 0.7, allocation=sc.global_).masks.by_layer() == masks[0].layers


def test_acdc_resumed_and_unfinished():
    def fresh():
        model = net()
        acdc = sc.ACDC(model, sc.Magnitude(), 0.7, sc.Phases((0, 4, 9)), pattern=sc.Block(2, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), acdc

    whole, optimizer, acdc = fresh()
    with acdc.attach(optimizer):
        train(whole, optimizer, 12)
    for stop in (0, 4, 7, 9):
        model, optimizer, first = fresh()
        attached = first.attach(optimizer)
        train(model, optimizer, stop)
        attached.release()
        state = copy.deepcopy([x.state_dict() for x in (model, optimizer, first)])
        again, optimizer, second = fresh()
        for x, s in zip((again, optimizer, second), state, strict=True):
            x.load_state_dict(s)
        with second.attach(optimizer):
            train(again, optimizer, 12 - stop, stop)
        assert second.masks == acdc.masks
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    model, optimizer, acdc = fresh()
    with pytest.raises(ScheduleError, match="ended at step 8"), acdc.attach(optimizer):
        train(model, optimizer, 8)
