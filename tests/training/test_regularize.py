"""Penalties against closed forms, and the zeros that they make."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.errors import ScheduleError, SecateurError, SelectionError


def regression(seed: int = 0, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten orthonormal inputs, three of which matter."""
    g = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(n, 10, generator=g, dtype=torch.float64))[0]
    w = torch.tensor([3.0, -2, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    return x, x @ w + 0.05 * torch.randn(n, generator=g, dtype=torch.float64)


def solved(model, method, x, y, steps=400, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with method.attach(optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (model(x)[:, 0] - y).square().sum()).backward()
            optimizer.step()


def test_proximal_l1_is_the_lasso():
    """With orthonormal inputs the lasso is soft thresholding of the least-squares solution."""
    x, y = regression()
    model = nn.Linear(10, 1, bias=False).double()
    solved(model, sc.Regularize(model, sc.L1(0.2)), x, y)
    ols = x.T @ y
    expected = ols.sign() * (ols.abs() - 0.2).clamp(min=0)
    assert torch.allclose(model.weight[0], expected, atol=1e-9)
    assert (model.weight[0] == 0).sum() == 7  # exactly, not nearly
    assert sc.Masks.of(model)["weight"].sum() == 3


def test_plain_l1_and_l2():
    x, y = regression()
    ols = x.T @ y
    model = nn.Linear(10, 1, bias=False).double()
    solved(model, sc.Regularize(model, sc.L2(0.5)), x, y)
    assert torch.allclose(model.weight[0], ols / 1.5, atol=1e-9)
    solved(model, sc.Regularize(model, sc.L1(0.2, proximal=False)), x, y)
    expected = ols.sign() * (ols.abs() - 0.2).clamp(min=0)
    assert torch.allclose(model.weight[0], expected, atol=0.05)
    assert not (model.weight == 0).any()  # a subgradient alone never gives a zero


def test_the_penalty_comes_after_clipping_and_accumulation():
    """It is added once a step, whatever the batches, and clipping does not shrink it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(6, 4)
    with sc.Regularize(model, sc.L2(0.1)).attach(optimizer):
        for part in x.split(2):
            model(part).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
        optimizer.step()
    assert torch.allclose(model.weight, before * (1 - 0.5 * 0.1), atol=1e-7)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 16, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


def pictures(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A class is the quarter of the picture that is bright."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (64,), generator=g)
    x = torch.randn(64, 1, 8, 8, generator=g) * 0.3
    for i, k in enumerate(y.tolist()):
        x[i, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    return x, y


def fit(model, method, steps=150, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    with method.attach(optimizer):
        for step in range(steps):
            x, y = pictures(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


def accuracy(model) -> float:
    x, y = pictures(10_000)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_proximal_group_step_is_the_closed_form():
    model = Net()
    graph = sc.Graph.trace(model, torch.zeros(2, 1, 8, 8))
    lasso = sc.GroupLasso(model, graph, 0.02, kinds="neurons")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with lasso.attach(optimizer):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    rows = torch.cat([before["hidden.weight"], before["hidden.bias"][:, None]], 1)
    shrunk = rows * (1 - 0.5 * 0.02 * rows.shape[1] ** 0.5 / rows.norm(dim=1, keepdim=True)).clamp(min=0)
    assert torch.allclose(model.hidden.weight, shrunk[:, :-1]) and torch.allclose(
        model.hidden.bias, shrunk[:, -1]
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "hidden" not in n)
    assert lasso.penalty() == pytest.approx(0.02 * float(shrunk.norm(dim=1).sum()) * rows.shape[1] ** 0.5)


def test_units_that_the_group_lasso_emptied_are_removed_without_a_change():
    model = Net()
    x = pictures(1)[0]
    graph = sc.Graph.trace(model, x)
    lasso = sc.GroupLasso(model, graph, 0.04)
    fit(model, lasso, 300)
    zero = lasso.zero_units()
    assert accuracy(model) > 0.95
    assert all(share > 0.2 for share in zero.values()) and len(zero) == 2
    with torch.no_grad():
        dense = model(x)
    neurons, filters = (g for g in graph.groups())
    size = {g.name: g.size for g in (neurons, filters)}
    left = {name: size[name] - round(share * size[name]) for name, share in zero.items()}
    sc.shrink_(model, x, sc.Budget.params(1.0), sparsity=zero)
    assert sorted(left.values()) == sorted([model.conv.out_channels, model.hidden.out_features])
    with torch.no_grad():
        assert torch.allclose(model(x), dense, atol=1e-5)


def test_heads_of_attention_are_units():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    graph = sc.Graph.trace(model, ids)
    lasso = sc.GroupLasso(model, graph, 1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lasso.attach(optimizer):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert set(lasso.zero_units().values()) == {1.0}
    attention = model.model.layers[0].self_attn
    assert not attention.v_proj.weight.any() and attention.o_proj.weight.any()
    assert model.model.embed_tokens.weight.any()


def test_network_slimming():
    model = Net()
    where = sc.batch_norm_scales(model)
    fit(model, sc.Regularize(model, sc.L1(0.01, proximal=False), where=where), 300)
    scales = model.norm.weight.detach().abs()
    assert (scales < 0.1 * scales.max()).sum() >= 2 and accuracy(model) > 0.95
    sc.shrink_(model, pictures(1)[0], sc.Budget.params(0.8), criterion=sc.BNScale(), kinds="filters")
    assert accuracy(model) > 0.9
    with pytest.raises(SelectionError, match="no batch norm"):
        sc.batch_norm_scales(nn.Linear(2, 2))


def test_growing_regularisation_leaves_little_to_lose():
    model = Net()
    dense = copy.deepcopy(model)
    greg = sc.Growing(model, sc.Magnitude(), 0.9, end=200, increment=0.05, interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen = []
    model.train()
    with greg.attach(optimizer):
        for step in range(210):
            x, y = pictures(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            doomed = torch.cat([p[greg._doomed[n]] for n, p in _targets(model, greg)])
            seen.append((greg.strength, float(doomed.detach().norm())))
            optimizer.step()
    assert [s for s, _ in seen[:6]] == [0.0, 0.0, 0.05, 0.05, 0.1, 0.1] and seen[100][0] == 1.0
    assert seen[199][1] < 0.02 * seen[0][1]  # before the removal
    assert greg.masks == sc.prune_(dense, sc.Magnitude(), 0.9, allocation=sc.global_).masks
    assert greg.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    model.eval()
    assert accuracy(model) > 0.95
    with pytest.raises(ScheduleError, match="ended at step 3"):
        fit(model, sc.Growing(model, sc.Magnitude(), 0.9, end=200), 3)


def test_growing_regularisation_chooses_by_how_weights_respond():
    """GReg-2: with one penalty on all, what the loss needs stays large."""
    model = Net()
    first = sc.Growing(copy.deepcopy(model), sc.Magnitude(), 0.9, end=200, increment=0.002)
    greg = sc.Growing(model, sc.Magnitude(), 0.9, end=200, pick=100, increment=0.002, interval=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    with greg.attach(optimizer):
        for step in range(210):
            x, y = pictures(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            plain = {n: p.grad.clone() for n, p in _targets(model, greg)}
            weights = {n: p.detach().clone() for n, p in _targets(model, greg)}
            if step == 100:
                chosen = sc.prune_(copy.deepcopy(model), sc.Magnitude(), 0.9, allocation=sc.global_).masks
            greg.before_step(optimizer)
            for n, p in _targets(model, greg):
                on = 1.0 if step < 100 else (~chosen[n]).float()
                factor = greg.strength * on if step < 200 else 0.0
                torch.testing.assert_close(p.grad, plain[n] + factor * weights[n])
                p.grad.copy_(plain[n])  # the hook adds it itself
            optimizer.step()
    assert greg.masks == chosen
    fit(first.model, first, 210)
    assert greg.masks != first.masks
    assert accuracy(model.eval()) > 0.95


@pytest.mark.parametrize(("pick", "at"), [(0, 30), (60, 30), (20, 30), (60, 60)])
def test_growing_goes_on_with_what_it_chose(pick, at):
    """Not with what it would choose from the weights of the checkpoint."""

    def greg(model):
        return sc.Growing(model, sc.Magnitude(), 0.5, end=80, pick=pick, increment=0.05, interval=2)

    def run(model, method, optimizer, steps):
        model.train()
        attached = method.attach(optimizer)
        for step in steps:
            x, y = pictures(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        attached.release()

    whole = Net()
    half, start = copy.deepcopy(whole), copy.deepcopy(whole)
    method, optimizer = greg(whole), torch.optim.SGD(whole.parameters(), lr=0.05)
    run(whole, method, optimizer, range(90))
    begun = greg(half)
    run(half, begun, torch.optim.SGD(half.parameters(), lr=0.05), range(at))
    start.load_state_dict(half.state_dict())
    later = greg(start)
    later.load_state_dict(begun.state_dict())
    run(start, later, torch.optim.SGD(start.parameters(), lr=0.05), range(at, 90))
    assert later.masks == method.masks and 0.49 < method.masks.sparsity < 0.51
    for a, b in zip(start.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    state = begun.state_dict() | {"doomed": {}}
    with pytest.raises(sc.MaskError, match="what of these layers"):
        greg(Net()).load_state_dict(state | {"doomed": {"head.weight": torch.ones(1)}})


def _targets(model, method):
    return [(t.name, t.weight) for t in method.live.targets]


@pytest.mark.parametrize(
    "make",
    [
        lambda m, g: sc.L1(-1.0),
        lambda m, g: sc.L2(float("nan")),
        lambda m, g: sc.Regularize(m, sc.L1),
        lambda m, g: sc.GroupLasso(m, g, -1.0),
        lambda m, g: sc.GroupLasso(m, g, 1.0, kinds="heads"),
        lambda m, g: sc.Growing(m, sc.Magnitude(), 0.5, end=0),
        lambda m, g: sc.Growing(m, sc.Magnitude(), 0.5, end=9, pick=9),
        lambda m, g: sc.Growing(m, sc.Magnitude(), 1.5, end=9),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    model = Net()
    graph = sc.Graph.trace(model, torch.zeros(2, 1, 8, 8))
    with pytest.raises(SecateurError):
        make(model, graph)
