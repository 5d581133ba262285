"""`prune_` with a solver: sequential, exact, undone on errors."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.solvers import Quadratic, Solver

SOLVERS = (sc.SparseGPT(), sc.ALPS())


class Block(nn.Module):
    """Attention-like sharing: two layers take in the same tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def model_and_data(width: int = 16, blocks: int = 3) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(blocks)), nn.Linear(width, 5))
    mix = torch.randn(width, width)
    return model, [torch.randn(8, 12, width) @ mix for _ in range(4)]


def _reference(
    model: nn.Module, data: list[Tensor], solver: Solver, pattern: sc.Pattern, sparsity: float
) -> dict[str, float]:
    """Whole passes, and a Gram matrix of its own for each layer, in the order of execution; the errors."""
    errors = {}
    for name in (f"{i}.{layer}" for i in range(3) for layer in ("gate", "up", "down")):
        module = model.get_submodule(name)
        heard: list[Tensor] = []
        # gate and up hear the same, which neither changes.
        handle = module.register_forward_pre_hook(lambda m, args, h=heard: h.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for x in data:
                model(x)
        handle.remove()
        rows = torch.cat(heard).double()
        objective = Quadratic(rows.T @ rows / len(rows), solver.damping)
        solved = solver(module.weight.detach(), objective, pattern, sparsity)
        errors[f"{name}.weight"] = solved.error
        module.weight.data.copy_(solved.weight)
    return errors


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), [(sc.Unstructured(), 0.6), (sc.NM(2, 4), 0.5)], ids=str)
def test_each_layer_is_fitted_to_what_the_pruned_ones_before_pass_on(
    solver: Solver, pattern: sc.Pattern, sparsity: float
) -> None:
    model, data = model_and_data()
    expected = copy.deepcopy(model)
    errors = _reference(expected, data, solver, pattern, sparsity)
    report = sc.prune_(model, solver, sparsity, pattern=pattern, batches=data)
    # The head is left alone. Rounding decides a few entries of a mask, and all that follows from them.
    assert {layer.name: layer.error for layer in report.layers} == pytest.approx(errors, rel=0.05)
    for layer in report.layers:
        same = (model.get_parameter(layer.name) == 0) == (expected.get_parameter(layer.name) == 0)
        assert same.float().mean() > 0.9, layer.name
    with torch.no_grad():
        gap = (model(data[0]) - expected(data[0])).square().mean() / expected(data[0]).square().mean()
    assert gap < 0.02


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_report_counts_exactly_and_says_each_error(solver: Solver) -> None:
    model, data = model_and_data()
    dense = copy.deepcopy(model)
    report = sc.prune_(model, solver, 0.5, batches=data)
    assert report.removed == sum(layer.entries for layer in report.layers) // 2
    report.masks.check(model)
    assert all(layer.error is not None and 0 < layer.error < 0.5 for layer in report.layers)
    x = torch.cat([model[0].norm(d).flatten(0, -2) for d in data]).detach()
    with torch.no_grad():
        lost = (x @ (model[0].gate.weight - dense[0].gate.weight).T).square().sum()
        whole = (x @ dense[0].gate.weight.T).square().sum()
    assert report.layers[0].error == pytest.approx(float(lost / whole), rel=1e-3)
    assert "error" in str(report) and report.to_dict()["layers"][0]["error"] == report.layers[0].error


class Skipping(nn.Module):
    """What the first block returns is used twice, so that the model cannot be entered behind the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[3](self.blocks[2](self.blocks[1](first)) - 3 * first)


def test_a_model_that_cannot_be_entered_in_its_middle_is_run_whole() -> None:
    torch.manual_seed(0)
    model, data = Skipping(16), [torch.randn(8, 12, 16) for _ in range(3)]
    report = sc.prune_(model, sc.SparseGPT(), 0.5, batches=data, where=sc.Where(exclude="blocks.3.down"))
    gate = next(layer for layer in report.layers if layer.name == "blocks.3.gate.weight")
    torch.manual_seed(0)
    dense = Skipping(16)
    heard: list[Tensor] = []
    model.blocks[3].gate.register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for x in data:
            model(x)
        x = torch.cat(heard)
        lost = x @ (model.blocks[3].gate.weight - dense.blocks[3].gate.weight).T
        whole = x @ dense.blocks[3].gate.weight.T
    # The error is that on the inputs that the pruned model really passes on.
    assert gate.error == pytest.approx(float(lost.square().sum() / whole.square().sum()), rel=1e-3)


def test_solvers_beat_criteria_and_each_other_on_the_output() -> None:
    model, data = model_and_data(24, 3)
    x = torch.cat(data)
    expected = model(x).detach()

    def lost(criterion: Any) -> float:
        twin = copy.deepcopy(model)
        sc.prune_(twin, criterion, 0.6, batches=data)
        with torch.no_grad():
            return float((twin(x) - expected).square().mean() / expected.square().mean())

    errors = [lost(c) for c in (sc.Magnitude(), sc.Wanda(), sc.SparseGPT(), sc.ALPS())]
    assert errors[0] > errors[2] > errors[3] and errors[1] > errors[2]


def test_sizes_follow_the_allocation() -> None:
    model, data = model_and_data()
    report = sc.prune_(
        model, sc.SparseGPT(), allocation=sc.custom({"*.down*": 0.75, "*": 0.25}), batches=data
    )
    assert {layer.name.split(".")[1]: layer.sparsity for layer in report.layers} == {
        "gate": 0.25,
        "up": 0.25,
        "down": 0.75,
    }


@pytest.mark.parametrize("allocation", [sc.global_, sc.owl, sc.lamp], ids=["global", "owl", "lamp"])
def test_allocations_that_rank_get_the_scores_of_wanda_on_the_dense_model(allocation: Any) -> None:
    model, data = model_and_data()
    twin = copy.deepcopy(model)
    wanda = sc.prune_(twin, sc.Wanda(), 0.6, allocation=allocation, batches=data)
    report = sc.prune_(model, sc.SparseGPT(), 0.6, allocation=allocation, batches=iter(data))
    assert [x.removed for x in report.layers] == [x.removed for x in wanda.layers]
    assert len({x.sparsity for x in report.layers}) > 1


def test_convolutions_and_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    report = sc.prune_(model, sc.SparseGPT(), 0.5, pattern=sc.Block(1, 1), batches=[torch.randn(4, 3, 8, 8)])
    assert report.sparsity == 0.5
    half, data = model_and_data()
    half.bfloat16()
    report = sc.prune_(half, sc.ALPS(), 0.5, batches=[d.bfloat16() for d in data])
    assert half[0].gate.weight.dtype == torch.bfloat16 and report.sparsity == 0.5
    report.masks.check(half)


def test_dead_inputs_are_noted_with_their_layers() -> None:
    model, data = model_and_data()
    for d in data:
        d[..., 3] = 0
    first = nn.Sequential(nn.Linear(16, 16), model)
    report = sc.prune_(first, sc.SparseGPT(), 0.5, batches=data)
    assert "0.weight: 1 of 16 inputs are zero on all data: their weights go first." in report.notes
    assert not first[0].weight[:, 3].any()


def _bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batches": None}, "batches"),
        ({"loss": F.mse_loss}, "play no part"),
        ({"rounds": 3}, "play no part"),
        ({"batches": [torch.full((2, 3, 16), float("nan"))]}, "not finite"),
        ({"batches": [torch.zeros(2, 3, 16)]}, "zero everywhere"),
    ],
)
def test_errors_leave_the_model_as_it_was(change: dict[str, Any], match: str) -> None:
    model, data = model_and_data()
    model = nn.Sequential(nn.Linear(16, 16, bias=False), model)
    before = _bits(model)
    with pytest.raises(sc.SecateurError, match=match):
        sc.prune_(model, sc.SparseGPT(), 0.5, **({"batches": data} | change))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_layers_out_of_reach_are_refused_by_name() -> None:
    model, data = model_and_data()
    model.add_module("idle", nn.Linear(16, 16))
    model.forward = lambda x: model[:4](x)  # type: ignore[method-assign]
    with pytest.raises(sc.StatsError, match=r"idle\.weight, its module is not called"):
        sc.prune_(model, sc.SparseGPT(), 0.5, batches=data, where=sc.Where(also="idle.weight"))
    gru = nn.Sequential(nn.GRU(4, 4, batch_first=True))
    with pytest.raises(sc.SelectionError, match="none of the selected weights"):
        sc.prune_(gru, sc.SparseGPT(), 0.5, batches=[torch.randn(2, 3, 4)])


def test_layers_that_are_not_called_are_left_alone_with_the_reason() -> None:
    model, data = model_and_data()
    head = model[3]
    model[3] = Idle(16, head)
    report = sc.prune_(model, sc.SparseGPT(), 0.5, batches=data)
    assert any("not called" in why for name, why in report.skipped if name == "3.idle.weight")
    assert bool((model[3].idle.weight != 0).all())


class Idle(nn.Module):
    """One layer is called, the other's weight is not used."""

    def __init__(self, width: int, head: nn.Module) -> None:
        super().__init__()
        self.idle = nn.Linear(width, width)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_a_failure_half_way_is_undone() -> None:
    model, data = model_and_data()
    before = _bits(model)
    done: list[int] = []

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if model[1].down.weight.count_nonzero() < model[1].down.weight.numel():
                done.append(1)
                raise RuntimeError("out of order")
            return x

    model.insert(2, Failing())
    with pytest.raises(sc.StatsError, match="out of order"):
        sc.prune_(model, sc.SparseGPT(), 0.5, batches=data)
    assert done and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_is_neither_criterion_nor_solver_is_refused() -> None:
    # In a process of its own: here the annotations are checked, and refuse it first.
    code = (
        "import torch, secateur as sc\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
        "before = model[0].weight.clone()\n"
        "try:\n    sc.prune_(model, 'magnitude', 0.5)\n"
        "except sc.SecateurError as error:\n    print(error, torch.equal(model[0].weight, before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "prune_ takes a criterion such as Magnitude() or a solver; got 'magnitude'. True\n"
    )
