"""What the coverage benchmark asks of Secateur for one model: each stage a function, all calls to it in here.

    trace -> choose -> prune -> forward, backward, twin, permute, roundtrip

Every function returns what its stage found as plain data, or raises.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import zoo
from secateur.artifacts import load, save
from secateur.core.errors import SecateurError
from secateur.graph import Graph, Group
from secateur.graph.oracle import difference, outputs
from secateur.graph.trace import results
from secateur.surgery import Plan, Surgery

Example = tuple[tuple[Any, ...], dict[str, Any]]
Kept = dict[Group, list[int]]
TOLERANCE = 1e-5
TOLERANCE_DOUBLE = 1e-6


def trace(model: nn.Module, example: Example) -> tuple[Graph, dict[str, Any]]:
    """The graph, and what it says of the model."""
    start = time.perf_counter()
    graph = Graph.trace(model, *example[0], **example[1])
    found = {
        "trace_seconds": round(time.perf_counter() - start, 3),
        "fake": graph.traced.note is None,
        "kinds": dict(Counter(group.kind for group in graph.groups())),
        "inexact": sum(not group.exact for group in graph.groups()),
        "share": round(graph.prunable_share(), 4),
        "frozen": [{"reason": row.reason, "share": round(row.share, 4)} for row in graph.frozen()[:5]],
        "notes": list(graph.notes),
    }
    return graph, found


def choose(graph: Graph, groups: Sequence[Group], seed: int) -> Kept:
    """Half of every group, at random; groups of one cluster lose one share, the largest not above a half.

    A group of which no such share exists is left whole.
    """
    wanted = set(groups)
    generator = torch.Generator().manual_seed(seed)
    kept: Kept = {}
    clustered = {g for cluster in graph.clusters() for g in cluster}
    alone = [(g,) for g in groups if g not in clustered]
    for cluster in [*graph.clusters(), *alone]:
        if not all(g in wanted for g in cluster):
            continue
        parts = math.gcd(*(g.size // g.step if g.size % g.step == 0 else 1 for g in cluster))
        for g in cluster:
            left = g.size - g.size * (parts // 2) // parts
            if left < g.size:
                kept[g] = sorted(torch.randperm(g.size, generator=generator)[:left].tolist())
    return kept


def fit(graph: Graph, kept: Kept) -> tuple[Kept, list[str]]:
    """What of `kept` the model's code can follow, and the refusals: one cluster after another is taken up."""
    try:
        Surgery(kept).plan()
        return kept, []
    except SecateurError as error:
        refusals = [str(error)]
    together = {g: cluster for cluster in graph.clusters() for g in cluster}
    taken: Kept = {}
    for group in kept:
        if group in taken:
            continue
        more = {g: kept[g] for g in together.get(group, (group,)) if g in kept}
        try:
            Surgery(taken | more).plan()
            taken |= more
        except SecateurError as error:
            refusals.append(str(error))
    return taken, refusals


def prune(model: nn.Module, kept: Kept) -> tuple[nn.Module, Plan, dict[str, Any]]:
    """A pruned copy of the model."""
    surgery = Surgery(kept)
    plan = surgery.plan()
    pruned = copy.deepcopy(model)
    surgery.apply_(pruned)
    params = sum(p.numel() for p in pruned.parameters())
    if params != plan.after.params:
        raise AssertionError(f"{params} parameters are left, and {plan.after.params} were predicted.")
    return (
        pruned,
        plan,
        {
            "groups": len(kept),
            "left": round(params / max(1, plan.before.params), 4),
            "macs_left": round(plan.after.macs / max(1, plan.before.macs), 4),
            "plan_notes": list(plan.notes[:5]),
        },
    )


def forward(model: nn.Module, pruned: nn.Module, example: Example) -> dict[str, Any]:
    """Outputs keep their shapes and are finite."""
    before, after = outputs(model, example), outputs(pruned, example)
    shapes = [tuple(t.shape) for t in before], [tuple(t.shape) for t in after]
    if shapes[0] != shapes[1]:
        raise AssertionError(f"The outputs were {shapes[0]} and are {shapes[1]}.")
    if not all(bool(t.isfinite().all()) for t in after):
        raise AssertionError("An output is not finite.")
    return {"change": difference(before, after)}


def _gradients(model: nn.Module, example: Example) -> tuple[dict[str, Tensor], set[str]]:
    """Gradients of the sum of all outputs, by parameter, where there are any; modules that were called."""
    model.zero_grad(set_to_none=True)
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    found = results(model(*copy.deepcopy(example[0]), **copy.deepcopy(example[1])))
    for hook in hooks:
        hook.remove()
    total = sum(t.sum() for t in found if t.is_floating_point() and t.requires_grad)
    assert isinstance(total, Tensor), "no output depends on a parameter"
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients, called


def backward(model: nn.Module, pruned: nn.Module, example: Example) -> dict[str, Any]:
    """Every parameter that is left and had a gradient before has a finite one.

    But those of an expert that no token is sent to any more, as its module is not called.
    """
    (before, busy), (after, still) = _gradients(model, example), _gradients(pruned, example)
    names = {n for n, _ in pruned.named_parameters()}
    idle = busy - still
    missing = [n for n in before if n in names and n not in after and n.rpartition(".")[0] not in idle]
    infinite = [n for n, g in after.items() if not bool(g.isfinite().all())]
    if missing or infinite:
        raise AssertionError(f"No gradient: {missing[:3]}. Not finite: {infinite[:3]}.")
    return {"gradients": len(after)}


def twin(graph: Graph, model: nn.Module, kept: Kept, pruned: nn.Module, example: Example) -> dict[str, Any]:
    """Difference of the pruned model from the masked twin, and what pruning changed.

    Groups for which removing is not zeroing are left whole, in another copy, if there are any.
    """
    exact = {g: indices for g, indices in kept.items() if g.exact}
    if not exact:
        return {"groups": 0, "left_out": len(kept)}
    if len(exact) < len(kept):
        exact, _ = fit(graph, exact)
        if not exact:
            return {"groups": 0, "left_out": len(kept)}
        pruned, _, _ = prune(model, exact)
    found = outputs(pruned, example)
    error = difference(outputs(graph.masked_twin(exact), example), found)
    change = difference(outputs(model, example), found)
    row = {"groups": len(exact), "left_out": len(kept) - len(exact), **_compared(error, change)}
    return _decided(row, lambda: _twin_in_double(model, exact, example))


def _decided(row: dict[str, Any], in_double: Callable[[], float]) -> dict[str, Any]:
    """The row, which float64 decides where float32 failed.

    A network of random weights can amplify rounding; what is wrong would be as wrong in float64.
    """
    if not row.get("ok", True) and (error := in_double()) <= TOLERANCE_DOUBLE:
        row |= {"ok": True, "error_in_float64": error}
    return row


def _double(model: nn.Module, example: Example) -> tuple[Graph, Example]:
    """The graph of a copy in float64, and the example for it."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    example = tree_map(wide, example)
    return trace(copy.deepcopy(model).double(), example)[0], example


def _twin_in_double(model: nn.Module, kept: Kept, example: Example) -> float:
    """The difference from the masked twin in float64, of copies."""
    graph, example = _double(model, example)
    groups = {g.name: g for g in graph.groups()}
    kept = {groups[g.name]: indices for g, indices in kept.items()}
    pruned, _, _ = prune(graph.model, kept)
    return difference(outputs(graph.masked_twin(kept), example), outputs(pruned, example))


def _compared(error: float, change: float) -> dict[str, Any]:
    """Both figures, and a failure where the error is more than rounding."""
    row: dict[str, Any] = {"error": error, "change": change}
    if not error <= TOLERANCE:
        row |= {"ok": False, "failure": f"differs by {error:.1e} where the change is {change:.1e}"}
    return row


def permute(graph: Graph, model: nn.Module, example: Example) -> dict[str, Any]:
    """The permutation oracle on what the masked twin cannot prove: width, and groups that are not exact."""
    chosen = [g for g in graph.groups() if g.kind == "width" or not g.exact]
    if not chosen:
        return {"groups": 0}
    check = graph.verify(chosen)
    row = {"groups": len(chosen), **_compared(check.error, check.change)}
    return _decided(row, lambda: _permuted_in_double(model, {g.name for g in chosen}, example))


def _permuted_in_double(model: nn.Module, names: set[str], example: Example) -> float:
    """What reordering the units of some groups changes in float64, of a copy."""
    graph, _ = _double(model, example)
    return graph.verify([g for g in graph.groups() if g.name in names]).error


def roundtrip(name: str, pruned: nn.Module, plan: Plan, example: Example, folder: Path) -> dict[str, Any]:
    """Saved; loaded by a fresh process that knows only the model's name; outputs equal bit for bit."""
    save(pruned, folder / "model", surgery=[plan.cuts])
    command = [sys.executable, "-m", "benchmarks.zoo.stages", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"Loading failed: {done.stderr.strip()[-250:]}")
    found = load_file(folder / "outputs.safetensors")
    want = outputs(pruned, example)
    if len(found) != len(want) or not all(torch.equal(found[str(i)], t) for i, t in enumerate(want)):
        error = difference(want, [found[str(i)] for i in range(len(want))])
        raise AssertionError(f"The loaded model's outputs differ by {error:.1e}.")
    return {"bytes": sum(f.stat().st_size for f in (folder / "model").iterdir())}


def reload(name: str, folder: Path) -> None:
    """The other side of `roundtrip`: a model of transformers from the folder alone, others into a fresh one.

    Everything that the files hold is first made zero in the fresh model, which has the same weights.
    """
    model, args, kwargs = zoo.build(name)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    loaded = load(folder / "model", None if name.startswith("transformers/") else model)
    found = outputs(loaded, (args, kwargs))
    save_file({str(i): t.contiguous().clone() for i, t in enumerate(found)}, folder / "outputs.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    reload(sys.argv[1], Path(sys.argv[2]))
