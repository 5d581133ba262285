"""Movement pruning of units against explicit gates and autograd, and what `shrink_` makes of its end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import secateur as sc
from secateur.core.errors import BudgetError, MaskError, SecateurError, SelectionError, StatsError


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))


def data(step: int, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def train(model, optimizer, steps) -> None:
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def movement(model, final=0.6, end=60, **more):
    graph = sc.Graph.trace(model, torch.zeros(2, 6))
    return sc.UnitMovement(model, graph, sc.cubic(0, final, begin=10, end=end), when=sc.every(5), **more)


COSTS = {"2.weight": 6 + 1 + 24, "4.weight": 16 + 1 + 3}


def reference(model, steps):
    """Gates as autograd sees them: scores by Adam, weights by SGD, the choice straight through."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    scores = {"2.weight": torch.zeros(16), "4.weight": torch.zeros(24)}
    scores = {n: s.requires_grad_() for n, s in scores.items()}
    keep = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    sgd = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(scores.values(), lr=1e-2)
    for step in range(steps):
        x, y = data(step)
        gates = {n: k.float().requires_grad_() for n, k in keep.items()}
        used = dict(weights) | {n: weights[n] * g for n, g in gates.items()}
        loss = F.cross_entropy(functional_call(model, used, x), y)
        sgd.zero_grad()
        loss.backward()
        for n, s in scores.items():
            s.grad = gates[n].grad
        done = step + 1
        if done <= 60:  # afterwards scores and masks stay
            adam.step()
        sgd.step()
        if done >= 10 and done <= 60 and (done - 10) % 5 == 0:
            share = 0.6 - 0.6 * (1 - (done - 10) / 50) ** 3
            units = [(float(s), n, i) for n, row in scores.items() for i, s in enumerate(row.detach())]
            best = {n: int(row.detach().argmax()) for n, row in scores.items()}
            keep = {n: torch.ones_like(k) for n, k in keep.items()}
            gone, total = 0, 16 * COSTS["2.weight"] + 24 * COSTS["4.weight"]
            for _, n, i in sorted(units):
                if i != best[n] and gone < share * total:
                    keep[n][i] = False
                    gone += COSTS[n]
    return weights, scores, keep


@pytest.mark.parametrize("steps", [10, 37, 70])
def test_units_move_as_gates_under_autograd(steps):
    model = net()
    weights, scores, keep = reference(copy.deepcopy(model), steps)
    method = movement(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attached = method.attach(optimizer)
    train(model, optimizer, range(steps))
    attached.release()
    found = dict(zip(("2.weight", "4.weight"), method.scores().values(), strict=True))
    for name, row in scores.items():
        torch.testing.assert_close(found[name], row.detach(), rtol=1e-4, atol=1e-5)
        kept = model.get_parameter(name).detach().abs().sum(0) > 0
        assert torch.equal(kept, keep[name])
        torch.testing.assert_close(
            model.get_parameter(name).detach(), weights[name].detach() * keep[name], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(model[0].weight.detach(), weights["0.weight"].detach(), rtol=1e-4, atol=1e-5)
    assert (steps == 10) == all(bool(k.all()) for k in keep.values())


def test_shrink_removes_exactly_what_was_closed():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(100))
    method = movement(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with method.attach(optimizer):
        train(model, optimizer, range(100, 250))
    kept = method._kept()
    gone = sum(float(method.units.costs[n][~k].sum()) for n, k in kept.items())
    assert 0.6 * method.units.total <= gone < 0.6 * method.units.total + max(COSTS.values())
    x, y = data(10**6, 500)
    with torch.no_grad():
        before = model(x)
    end = {"criterion": method, "kinds": method.kinds, "sparsity": method.closed()}
    sc.shrink_(model, x, sc.Budget.params(1.0), **end)
    assert model[0].out_features + model[2].out_features == sum(int(k.sum()) for k in kept.values())
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-5)
    assert float((before.argmax(1) == y).float().mean()) > 0.85
    with pytest.raises(StatsError, match="not pruned in training"):
        twin = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
        sc.shrink_(twin, x, sc.Budget.params(0.5), criterion=method)


def test_heads_and_neurons_of_a_transformer():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel(BertConfig(vocab_size=50, **sizes, **none), add_pooling_layer=False)
    ids = torch.arange(24).view(2, 12)
    graph = sc.Graph.trace(model, input_ids=ids)
    method = sc.UnitMovement(model, graph, sc.linear(0, 0.4, begin=1, end=30), when=sc.every(3))
    assert sorted(method.kinds) == ["heads", "neurons"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    with method.attach(optimizer):
        for _ in range(32):
            optimizer.zero_grad()
            model(input_ids=ids).last_hidden_state[:, 0].square().mean().backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
    parameters = sum(p.numel() for p in model.parameters())
    end = {"criterion": method, "kinds": method.kinds, "sparsity": method.closed()}
    sc.shrink_(model, {"input_ids": ids}, sc.Budget.params(1.0), **end)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).last_hidden_state, before, atol=1e-5)
    removed = parameters - sum(p.numel() for p in model.parameters())
    assert 0.4 * method.units.total <= removed <= 0.4 * method.units.total + 4 * 8 * 32 + 24


@pytest.mark.parametrize("at", [4, 33, 60, 65])
def test_it_goes_on_bit_by_bit(at):
    whole = net()
    half, start = copy.deepcopy(whole), net(1)

    def run(model, method, steps, state=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = method.attach(optimizer)
        train(model, optimizer, steps)
        attached.release()

    method = movement(whole)
    run(whole, method, range(80))
    begun = movement(half)
    run(half, begun, range(at))
    later = movement(start)
    start.load_state_dict(half.state_dict())
    later.load_state_dict(begun.state_dict())
    run(start, later, range(at, 80))
    assert later.masks == method.masks and later.closed() == method.closed()
    for a, b in zip(start.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(MaskError, match="scores"):
        movement(net()).load_state_dict({k: v for k, v in begun.state_dict().items() if k != "scores"})
    with pytest.raises(MaskError, match="units are closed"):
        movement(net()).load_state_dict(begun.state_dict() | {"kept": {}})


def test_what_cannot_be_had_is_refused():
    with pytest.raises(SelectionError, match="heads"):
        movement(net(), kinds="heads")
    with pytest.raises(BudgetError, match="can go"):
        movement(net(), final=0.97)
    with pytest.raises(SecateurError, match="learning rate"):
        movement(net(), rate=0.0)
    frozen = net()
    method = movement(frozen)
    frozen[4].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    with pytest.raises(StatsError, match=r"4\.weight has no gradient"), method.attach(optimizer):
        train(frozen, optimizer, range(1))
