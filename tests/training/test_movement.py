"""Movement pruning against a plain implementation with straight-through gradients by autograd."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import secateur as sc
from secateur.core.errors import MaskError, PatternError, ScheduleError, SecateurError, StatsError
from secateur.core.topk import count


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def train(model, optimizer, steps, first=0, schedule=None) -> None:
    for step in range(first, first + steps):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


class StraightThrough(torch.autograd.Function):
    """W x M in the forward pass; the gradient reaches the scores as if the mask were the scores."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return grad * mask, grad * weight, None


def shared(sparsity, sizes):
    """The same share of each matrix; what is left over from rounding down goes to the largest remainders."""
    out = {n: int(sparsity * size) for n, size in sizes.items()}
    left = count(sparsity, sum(sizes.values())) - sum(out.values())
    for n in sorted(sizes, key=lambda n: out[n] - sparsity * sizes[n])[:left]:
        out[n] += 1
    return out


def reference(schedule, steps, soft=None, block=None, decay=None, rate=0.02):
    """The paper's training loop: masks before every forward pass, two parameter groups."""
    model = net()
    weights = {n: model.get_parameter(n) for n in ("0.weight", "2.weight")}
    shape = {n: w.shape if block is None else (w.shape[0] // block, w.shape[1]) for n, w in weights.items()}
    scores = {n: nn.Parameter(torch.zeros(s)) for n, s in shape.items()}
    optimizer = adamw(model.parameters())
    if rate is None:
        score_optimizer = torch.optim.SGD(scores.values(), lr=1.0)
    else:
        score_optimizer = torch.optim.Adam(scores.values(), lr=rate)
    plans = [torch.optim.lr_scheduler.LambdaLR(o, decay) for o in (optimizer, score_optimizer) if decay]
    final = schedule(schedule.end)

    def masks(step):
        out, removed = {}, shared(schedule(step), {n: s.numel() for n, s in scores.items()})
        flat = torch.cat([s.detach().flatten() for s in scores.values()])
        lowest = torch.ones(len(flat))
        lowest[flat.argsort(stable=True)[: count(schedule(step), len(flat))]] = 0
        lowest = dict(zip(scores, lowest.split([s.numel() for s in scores.values()]), strict=True))
        for n, s in scores.items():
            if step < schedule.begin:
                out[n] = torch.ones_like(weights[n])
                continue
            if soft is None:
                k = removed[n]
                m = torch.ones(s.numel())
                m[s.detach().flatten().argsort(stable=True)[:k]] = 0
                m = m.view(s.shape)
            elif soft.threshold is None:
                m = lowest[n].view(s.shape)
            else:
                m = (s.detach().sigmoid() > soft.threshold * schedule(step) / final).float()
            out[n] = m if block is None else m.repeat_interleave(block, 0)
        return out

    for step in range(steps):
        x, y = data(step)
        m = masks(step)
        wide = {n: s if block is None else s.repeat_interleave(block, 0) for n, s in scores.items()}
        masked = {n: StraightThrough.apply(weights[n], wide[n], m[n]) for n in weights}
        loss = F.cross_entropy(functional_call(model, masked, x), y)
        if soft is not None:
            share = schedule(step + 1) / final  # of the step that follows
            loss = loss + soft.strength * share * sum(s.sigmoid().mean() for s in scores.values()) / len(
                scores
            )
        optimizer.zero_grad()
        score_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        score_optimizer.step()
        for plan in plans:
            plan.step()
    return model, {n: s.detach().flatten() for n, s in scores.items()}, masks(steps)


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("decay", [None, lambda step: 1 - step / 40])
@pytest.mark.parametrize("rate", [None, 0.02])
def test_hard_movement_is_that_of_the_paper(block, decay, rate):
    schedule = sc.cubic(0, 0.8, begin=3, end=30)
    expected, scores, masks = reference(schedule, 30, block=block, decay=decay, rate=rate)
    model = net()
    pattern = None if block is None else sc.Block(block, 1)
    movement = sc.Movement(model, schedule, when=sc.every(1), rate=rate, pattern=pattern)
    optimizer = adamw(model.parameters())
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, decay) if decay else None
    with movement.attach(optimizer):
        train(model, optimizer, 30, schedule=plan)
    for name, mask in masks.items():
        assert torch.allclose(movement.scores()[name], scores[name], atol=1e-5)
        assert torch.equal(movement.masks[name], mask.bool()), name
    for name, p in expected.named_parameters():
        mine = model.get_parameter(name)
        torch.testing.assert_close(mine, p * masks[name] if name in masks else p, rtol=1e-4, atol=1e-5)
    removed = movement.masks.entries - movement.masks.kept
    assert removed == count(0.8, movement.masks.entries // (block or 1)) * (block or 1)


def test_soft_movement_is_that_of_the_paper_until_the_final_cut():
    schedule = sc.cubic(0, 0.8, begin=0, end=30)
    soft = sc.Soft(threshold=0.5, strength=0.02, floor=0.0)
    expected, scores, masks = reference(schedule, 29, soft)
    model = net()
    movement = sc.Movement(model, schedule, when=sc.every(1), rate=0.02, soft=soft)
    optimizer = adamw(model.parameters())
    attached = movement.attach(optimizer)
    train(model, optimizer, 29)
    for name, mask in masks.items():
        assert torch.allclose(movement.scores()[name], scores[name], atol=1e-5)
        assert torch.equal(movement.masks[name], mask.bool()), name
        assert 0.05 < 1 - float(mask.mean()) < 0.99
    for name, p in expected.named_parameters():
        mine = model.get_parameter(name)
        torch.testing.assert_close(mine, p * masks[name] if name in masks else p, rtol=1e-4, atol=1e-5)
    train(model, optimizer, 3, 29)
    attached.release()
    movement.check()
    assert movement.masks.entries - movement.masks.kept == count(0.8, movement.masks.entries)
    assert any(note.startswith("The threshold would have removed") for note in movement.report().notes)
    # What the scores rank lowest over both layers is what went.
    kept = [s[movement.masks[n].flatten()] for n, s in movement.scores().items()]
    gone = [s[~movement.masks[n].flatten()] for n, s in movement.scores().items()]
    assert torch.cat(gone).max() <= torch.cat(kept).min()


def test_without_a_threshold_soft_movement_follows_the_schedule():
    schedule = sc.cubic(0, 0.8, begin=2, end=30)
    soft = sc.Soft(strength=0.02, floor=0.0)
    expected, scores, masks = reference(schedule, 30, soft)
    model = net()
    movement = sc.Movement(model, schedule, when=sc.every(1), rate=0.02, soft=soft)
    optimizer = adamw(model.parameters())
    with movement.attach(optimizer):
        train(model, optimizer, 30)
    sizes = [mask.numel() for mask in masks.values()]
    shares = [float(mask.mean()) for mask in masks.values()]
    assert abs(shares[0] - shares[1]) > 0.02  # ranked over both layers
    for name, mask in masks.items():
        assert torch.allclose(movement.scores()[name], scores[name], atol=1e-5)
        assert torch.equal(movement.masks[name], mask.bool()), name
    for name, p in expected.named_parameters():
        mine = model.get_parameter(name)
        torch.testing.assert_close(mine, p * masks[name] if name in masks else p, rtol=1e-4, atol=1e-5)
    assert [c.sparsity for c in movement.history] == [
        count(schedule(c.step), sum(sizes)) / sum(sizes) for c in movement.history
    ]
    assert not any(note.startswith("The threshold") for note in movement.report().notes)


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_every_layer_keeps_its_floor_to_the_end(threshold):
    model = net()
    soft = sc.Soft(threshold=threshold, strength=0.0, floor=0.15)
    movement = sc.Movement(model, sc.cubic(0, 0.8, begin=0, end=20), when=sc.every(1), rate=0.02, soft=soft)
    movement._scores.values["0.weight"].data -= 5.0  # so that the ranking would take all of this layer
    optimizer = adamw(model.parameters())
    with movement.attach(optimizer):
        train(model, optimizer, 20)
    mask = movement.masks["0.weight"]
    assert int(mask.count_nonzero()) == math.ceil(0.15 * mask.numel())
    assert movement.masks.entries - movement.masks.kept == count(0.8, movement.masks.entries)


def test_the_floor_keeps_every_layer_alive():
    model = net()
    soft = sc.Soft(threshold=0.9, strength=0.0, floor=0.1)  # scores near zero lie below
    movement = sc.Movement(model, sc.linear(0.5, 0.8, begin=1, end=5), when=sc.every(1), soft=soft)
    optimizer = adamw(model.parameters())
    with movement.attach(optimizer):
        train(model, optimizer, 3)
        for mask in movement.masks.values():
            assert int(mask.count_nonzero()) == mask.numel() - count(0.9, mask.numel())
        train(model, optimizer, 2, 3)


def test_what_moves_away_from_zero_stays_even_if_it_is_small():
    """A small weight that grows against a large one that shrinks: magnitude and movement disagree."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[3.0], [0.0]])
    for make, survivor in (
        (lambda m: sc.Movement(m, sc.one_shot(0.5, at=20), where=sc.Where(also="weight")), 0),
        (lambda m: sc.Gradual(m, sc.Magnitude(), sc.one_shot(0.5, at=20), where=sc.Where(also="weight")), 1),
    ):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.1, 2.0]]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
        method = make(model)
        with method.attach(optimizer):
            for _ in range(25):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
        assert method.masks["weight"].flatten().tolist() == [survivor == 0, survivor == 1]


def test_weights_come_back_with_what_they_had():
    model = net()
    movement = sc.Movement(model, sc.constant(0.5, begin=1, end=40), when=sc.every(1), rate=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    back = 0
    with movement.attach(optimizer):
        for step in range(40):
            before = movement.masks
            train(model, optimizer, 1, step)
            for t in movement.live.targets:
                new = movement.masks[t.name] & ~before[t.name]
                back += int(new.count_nonzero())
                assert (t.weight[new] != 0).all()
            movement.masks.check(model)
    assert back > 20


@pytest.mark.parametrize("soft", [None, sc.Soft(), sc.Soft(0.53, 1.0, 0.02)])
def test_resumed_is_uninterrupted_bit_for_bit(soft):
    def fresh():
        model = net()
        schedule = sc.cubic(0, 0.8, begin=2, end=15)
        return model, adamw(model.parameters()), sc.Movement(model, schedule, when=sc.every(2), soft=soft)

    whole, optimizer, movement = fresh()
    with movement.attach(optimizer):
        train(whole, optimizer, 18)
    for stop in (0, 1, 7, 15, 17):
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
        assert second.masks == movement.masks and second.history == movement.history
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    state = first.state_dict()
    model, optimizer, early = fresh()
    state["rest"] = early.state_dict()["rest"]
    with pytest.raises(MaskError, match="lacks the dense weights"):
        early.load_state_dict(state)


def test_patterns_and_layers_of_attention_heads():
    model = net()
    movement = sc.Movement(model, sc.cubic(0, 0.5, begin=1, end=12), when=sc.every(3), pattern=sc.NM(1, 2))
    optimizer = adamw(model.parameters())
    with movement.attach(optimizer):
        train(model, optimizer, 12)
    for mask in movement.masks.values():
        assert (mask.view(-1, 2).sum(1) == 1).all()
    conv = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)
    )
    movement = sc.Movement(conv, sc.cubic(0, 0.5, begin=1, end=6), when=sc.every(2), pattern=sc.Block(2, 4))
    optimizer = adamw(conv.parameters())
    with movement.attach(optimizer):
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(step))
            F.cross_entropy(conv(x), torch.arange(8) % 3).backward()
            optimizer.step()
    assert movement.masks.sparsity == pytest.approx(0.5, abs=0.02)


def test_what_goes_wrong():
    model = net()
    rise = sc.cubic(0, 0.5, begin=0, end=10)
    with pytest.raises(SecateurError, match="threshold"):
        sc.Soft(threshold=1.0)
    with pytest.raises(SecateurError, match="learning rate"):
        sc.Movement(model, rise, rate=0.0)
    with pytest.raises(PatternError):
        sc.Movement(model, rise, pattern=sc.NM(2, 5))
    with pytest.raises(ScheduleError, match="ends at step 10"):
        sc.Movement(model, rise).attach(adamw(model.parameters()), steps=9)
    model[0].weight.requires_grad_(False)
    optimizer = adamw(model.parameters())
    with (
        pytest.raises(StatsError, match=r"0\.weight has no gradient"),
        sc.Movement(model, rise).attach(optimizer),
    ):
        train(model, optimizer, 1)
