"""L0 gates and STR against autograd, and the exact targets in which they end."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import secateur as sc
from secateur.core.errors import BudgetError, MaskError, ScheduleError, SecateurError, SelectionError
from secateur.core.topk import count
from secateur.schedules import check_schedule
from secateur.training import gates


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))


def data(step: int, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def train(model, optimizer, steps, first=0) -> None:
    for step in range(first, first + steps):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model) -> float:
    x, y = data(10**6, 500)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def traced(model):
    return sc.Graph.trace(model, torch.zeros(2, 6))


# ------ L0


def test_gradients_of_gates_and_weights_are_those_of_autograd():
    model = net()
    l0 = sc.L0(model, traced(model), 0.5, begin=0, end=100, initial=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = l0.attach(optimizer)
    train(model, optimizer, 5)  # so that the multipliers are not zero
    dense = {n: w.clone() for n, w in l0._shadow.dense.items()}
    alpha = {g.name: l0._alpha[g.name].clone().requires_grad_() for g, _ in l0.units.groups}
    linear, square = (float(l0._multipliers[k]) for k in ("linear", "square"))

    x, y = data(5)
    weights = {n: w.clone().requires_grad_() for n, w in dense.items()}
    gated, kept, total = {}, 0.0, 0.0
    for (group, users), name in zip(l0.units.groups, ("2.weight", "4.weight"), strict=True):
        import hashlib

        digest = hashlib.sha256(f"0/{group.name}/5".encode()).digest()
        u = torch.rand(
            group.size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        )
        s = torch.sigmoid((u.log() - (1 - u).log() + alpha[group.name]) / (2 / 3)) * 1.2 - 0.1
        assert [p.tensor for p in users] == [name]
        gated[name] = weights[name] * s.clamp(0, 1)
        cost = {"2.weight": 6 + 1 + 24, "4.weight": 16 + 1 + 3}[name]
        p = torch.sigmoid(alpha[group.name] - (2 / 3) * torch.tensor(0.1 / 1.1).log())
        kept, total = kept + cost * p.sum(), total + cost * group.size
    ahead = 1 - kept / total - 0.5 * 5 / 100
    assert ahead.item() == pytest.approx(l0.expected - l0.target, abs=1e-5)
    loss = F.cross_entropy(functional_call(model, gated, x), y) + linear * ahead + square * ahead**2
    loss.backward()

    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    l0.before_step(optimizer)
    for group, _ in l0.units.groups:
        torch.testing.assert_close(
            l0._gradients[group.name].float(), alpha[group.name].grad, rtol=1e-3, atol=1e-6
        )
    for name, w in weights.items():
        torch.testing.assert_close(model.get_parameter(name).grad, w.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(model.get_parameter(name).detach(), dense[name])
    attached.release()


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_gates_reach_the_target_and_shrink_removes_what_they_closed(sparsity):
    model = net()
    graph = traced(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 150)
    l0 = sc.L0(model, graph, sparsity, begin=20, end=250)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with l0.attach(optimizer):
        train(model, optimizer, 230)
        assert l0.expected == pytest.approx(l0.target, abs=0.1)  # where the multipliers lead it
        with l0.settled():
            settled = accuracy(model)
        train(model, optimizer, 70, 230)
    assert accuracy(model) > 0.85 and settled > 0.8
    costs = torch.cat([c for c in l0.units.costs.values()])
    closed = torch.cat([~k for k in l0._kept().values()])
    gone = float(costs[closed].sum())
    assert sparsity * l0.units.total <= gone < sparsity * l0.units.total + float(costs.max())
    x = data(1)[0]
    with torch.no_grad():
        before = model(x)
    parameters = sum(p.numel() for p in model.parameters())
    sc.shrink_(model, x, sc.Budget.params(1.0), criterion=l0, sparsity=l0.closed())
    assert model[0].out_features + model[2].out_features == int((~closed).sum())
    assert sum(p.numel() for p in model.parameters()) < parameters * (1 - 0.8 * sparsity)
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-5)


def test_gates_on_heads():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    ids = torch.arange(24).view(2, 12)
    graph = sc.Graph.trace(model, input_ids=ids)
    l0 = sc.L0(model, graph, 0.4, begin=1, end=30)
    assert sorted({g.kind for g, _ in l0.units.groups}) == ["heads", "neurons"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with l0.attach(optimizer):
        for _ in range(32):
            optimizer.zero_grad()
            model(input_ids=ids).last_hidden_state[:, 0].square().mean().backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
    example = {"input_ids": ids}
    sc.shrink_(model, example, sc.Budget.params(1.0), criterion=l0, sparsity=l0.closed())
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).last_hidden_state, before, atol=1e-5)


def test_what_goes_wrong_with_gates():
    model = net()
    graph = traced(model)
    with pytest.raises(SelectionError, match="heads"):
        sc.L0(model, graph, 0.5, begin=0, end=9, kinds="heads")
    with pytest.raises(ScheduleError):
        sc.L0(model, graph, 0.5, begin=9, end=9)
    with pytest.raises(BudgetError, match="can go"):
        sc.L0(model, graph, 0.99, begin=0, end=9)
    with pytest.raises(SecateurError):
        sc.L0(model, graph, 1.0, begin=0, end=9)
    with pytest.raises(SecateurError, match="learning rate"):
        sc.L0(model, graph, 0.5, begin=0, end=9, rate=-1)
    l0 = sc.L0(model, graph, 0.5, begin=0, end=9)
    with pytest.raises(MaskError, match="lacks the gates"):
        l0.load_state_dict({k: v for k, v in l0.state_dict().items() if k != "gates"})


# ------ STR


@pytest.mark.parametrize("initial", [-2.5, None])
def test_str_is_eq_4_to_6_of_the_paper(initial):
    """With `initial` as it stands; else with thresholds that lie higher by what the sparsity asks."""
    model, twin = net(), net()
    names = ("0.weight", "2.weight")
    plan = sc.constant(0.8, begin=0, end=100)
    method = sc.STR(model, plan, initial=initial, decay=0.02, when=sc.every(1000))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    attached = method.attach(optimizer)
    train(model, optimizer, 25)

    level = 0.0
    if initial is None:
        sizes = torch.cat([twin.get_parameter(n).detach().abs().flatten() for n in names]).sort().values
        level = float(sizes[count(0.8, len(sizes)) - 1].logit())
    s = {n: torch.tensor(initial or 0.0, requires_grad=True) for n in names}
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(25):
        x, y = data(step)
        reference.zero_grad()
        soft = {
            n: w.sign() * F.relu(w.abs() - (s[n] + level).sigmoid())
            for n in names
            for w in [twin.get_parameter(n)]
        }
        F.cross_entropy(functional_call(twin, soft, x), y).backward()
        reference.step()
        with torch.no_grad():
            for t in s.values():
                t -= 0.1 * (t.grad + 0.02 * t)
                t.grad = None
    for n in names:
        assert method.thresholds()[n] == pytest.approx((s[n] + level).sigmoid().item(), rel=1e-4)
        w = twin.get_parameter(n)
        expected = w.sign() * F.relu(w.abs() - (s[n] + level).sigmoid())
        torch.testing.assert_close(model.get_parameter(n).detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method._shadow.dense[n], w.detach(), rtol=1e-4, atol=1e-5)
    attached.release()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_str_of_the_paper_ends_in_exact_masks_whatever_the_thresholds_did(decay):
    model = net()
    plan = sc.linear(0, 0.6, begin=10, end=60)
    method = sc.STR(model, plan, initial=-4.0, decay=decay, when=sc.every(20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with method.attach(optimizer):
        train(model, optimizer, 80)
    assert method.masks.entries - method.masks.kept == count(0.6, method.masks.entries)
    assert [c.step for c in method.history] == [10, 30, 50, 60]
    on_the_way = method.history[2].sparsity
    assert on_the_way > 0.7 if decay else on_the_way < 0.6
    (note,) = method.report().notes[1:]
    assert note.startswith("The thresholds had removed") and note.endswith("ranked for 60.00%.")
    short = sc.STR(model, plan)
    with pytest.raises(ScheduleError, match="ended at step 3"), short.attach(optimizer):
        train(model, optimizer, 3)


def test_str_follows_the_schedule_and_weights_come_back():
    model = net()
    plan = sc.cubic(0, 0.9, begin=5, end=60)
    method = sc.STR(model, plan, when=sc.every(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    masks = []
    with method.attach(optimizer):
        for step in range(70):
            train(model, optimizer, 1, step)
            masks.append(method.masks)
            if step + 1 in range(5, 60, 5):  # the model holds zeros where the weights lie below
                zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in ("0.weight", "2.weight"))
                assert abs(zeros - plan(step + 1) * masks[-1].entries) <= 1
    assert [c.step for c in method.history] == list(range(5, 65, 5))
    for change in method.history:
        assert change.sparsity == pytest.approx(change.asked, abs=1.01 / method.masks.entries)
    assert method.masks.entries - method.masks.kept == count(0.9, method.masks.entries)
    back = [bool((b[n] & ~a[n]).any()) for a, b in pairwise(masks) for n in a]
    assert any(back[:-20]) and not any(back[-20:])  # for each of two layers; not after the last change
    first, second = method.thresholds().values()
    assert first != second
    again = sc.STR(net(), plan, when=sc.every(5))
    again.load_state_dict(method.state_dict())
    assert again.thresholds() == method.thresholds()


def test_str_refuses_what_it_cannot_do():
    with pytest.raises(ScheduleError, match=r"removed at each step, such as sc\.cubic.*; got 0\.9\."):
        check_schedule(0.9)  # which all that follow a schedule call; here annotations are checked before
    plan = sc.linear(0, 0.6, begin=0, end=9)
    with pytest.raises(SecateurError, match="decay of the thresholds is finite"):
        sc.STR(net(), plan, decay=float("inf"))
    with pytest.raises(SecateurError, match="finite number; got initial=nan"):
        sc.STR(net(), plan, initial=float("nan"))
    method = sc.STR(net(), plan)
    for part in ("dense", "thresholds", "level"):
        state = {k: v for k, v in method.state_dict().items() if k != part}
        with pytest.raises(MaskError, match="lacks the dense weights and thresholds"):
            method.load_state_dict(state)


# ------ both


@pytest.mark.parametrize(
    "make",
    [
        lambda m: sc.L0(m, traced(m), 0.5, begin=2, end=15),
        lambda m: sc.STR(m, sc.linear(0, 0.6, begin=2, end=15), decay=0.05, when=sc.every(4)),
    ],
    ids=["l0", "str"],
)
def test_resumed_is_uninterrupted_bit_for_bit(make):
    def fresh():
        model = net()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), make(model)

    whole, optimizer, method = fresh()
    with method.attach(optimizer):
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
        assert second.masks == method.masks
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_probability_of_an_open_gate_is_that_of_its_draws():
    alpha = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    u = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = ((u.log() - (1 - u).log() + alpha) / (2 / 3)).sigmoid() * 1.2 - 0.1
    share = (drawn > 0).double().mean(0)
    assert torch.allclose(share, gates._open(alpha), atol=0.004)


def test_shrink_takes_the_closed_units_among_equal_ones():
    """Log odds stop at their bounds, so many are equal; which of them are closed the masks say."""
    model = net()
    l0 = sc.L0(model, traced(model), 0.6, begin=0, end=1)
    for alpha in l0._alpha.values.values():
        alpha.data.fill_(9.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with l0.attach(optimizer):
        train(model, optimizer, 2)
    x = data(1)[0]
    with torch.no_grad():
        before = model(x)
    closed = sum(float((~kept).sum()) for kept in l0._kept().values())
    sc.shrink_(model, x, sc.Budget.params(1.0), criterion=l0, sparsity=l0.closed())
    assert model[0].out_features + model[2].out_features == 40 - closed
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
