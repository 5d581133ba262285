"""Mixtures: each expert on its own inputs, whether it is a module or part of a stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from benchmarks import zoo
from secateur.solvers import Quadratic

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_a_stack_are_fitted_to_their_own_tokens(name: str) -> None:
    model, _, kwargs = zoo.build(f"transformers/{name}")
    other = {k: v.flip(0) for k, v in kwargs.items()}
    experts = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    dense = experts.gate_up_proj.detach().clone()
    heard: dict[int, list[Tensor]] = {}

    def hear(module: nn.Module, args: Any, given: Any) -> None:
        tokens, chosen = args[0], (args[1] if len(args) > 1 else given["router_indices"])
        for t in range(len(tokens)):
            for e in chosen[t].tolist():
                heard.setdefault(e, []).append(tokens[t])

    stack = "model.layers.0.mlp.experts.gate_up_proj"
    where = sc.Where(include=stack, also=stack)
    handle = experts.register_forward_pre_hook(hear, with_kwargs=True)
    with torch.no_grad():
        for batch in (kwargs, other):
            model(**batch)
    handle.remove()
    report = sc.prune_(model, sc.SparseGPT(), 0.5, batches=[kwargs, other], where=where)
    transposed = experts.is_transposed
    assert report.layers[0].removed == dense.numel() // 2
    for e, rows in heard.items():
        x = torch.stack(rows)
        weight = dense[e].T if transposed else dense[e]
        expected = sc.SparseGPT()(weight, Quadratic(x.T @ x / len(x)), sc.Unstructured(), 0.5)
        got = experts.gate_up_proj[e].detach()
        same = ((got.T if transposed else got) == 0) == (expected.weight == 0)
        assert same.float().mean() > 0.99, e


class Mixture(nn.Module):
    """Each token goes to the expert that its first feature names."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = x[:, 0].abs().long() % len(self.experts)
        for e in chosen.unique().tolist():
            out[chosen == e] = self.experts[e](x[chosen == e])
        return x + F.layer_norm(out, out.shape[-1:])


class Model(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture(8, experts) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude_and_said_so() -> None:
    torch.manual_seed(0)
    model = Model(4)
    data = [torch.cat([torch.randint(0, 3, (50, 1)) + 0.5, torch.randn(50, 7)], 1) for _ in range(3)]
    idle = model.layers[0].experts[3][0]
    dense = idle.weight.detach().clone()
    report = sc.prune_(model, sc.SparseGPT(), 0.5, batches=data)
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == 2 * 4 * 2
    assert all(layer.removed == 32 for layer in report.layers)
    assert any("no token" in note and "layers.0.experts.3.0" in note for note in report.notes)
    kept = idle.weight != 0
    assert float(dense[kept].abs().min()) >= float(dense[~kept].abs().max())
    assert torch.equal(idle.weight[kept], dense[kept])


def test_experts_are_measured_in_one_pass_each_on_its_own_tokens() -> None:
    torch.manual_seed(0)
    model = Model(3)
    data = [torch.cat([torch.randint(0, 3, (60, 1)) + 0.5, torch.randn(60, 7)], 1) for _ in range(3)]
    dense = [expert[0].weight.detach().clone() for expert in model.layers[0].experts]
    report = sc.prune_(model, sc.ALPS(), 0.5, batches=data)
    x = torch.cat(data)
    for e, weight in enumerate(dense):
        rows = x[x[:, 0].long() == e]
        lost = rows @ (model.layers[0].experts[e][0].weight.detach() - weight).T
        error = float(lost.square().sum() / (rows @ weight.T).square().sum())
        found = next(s for s in report.layers if s.name == f"layers.0.experts.{e}.0.weight")
        assert found.error == pytest.approx(error, rel=1e-3)
