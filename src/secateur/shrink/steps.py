"""One step of structured pruning: score, choose, repair, cut, prove."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.batchnorm import reestimate_batchnorm_
from secateur.budget import Budget, format_amount
from secateur.collect import Loss
from secateur.collect.batches import as_batches
from secateur.core.errors import BudgetError, SurgeryError
from secateur.criteria import Criterion
from secateur.graph import Check, Cost, Graph, Group, oracle
from secateur.measure import Measurement, measure
from secateur.reconstruct import RepairReport, Tokens, repair_
from secateur.reconstruct.measure import device_of
from secateur.reconstruct.worth import Gain, Judge, plain_values, put
from secateur.scoring import GroupCriterion, score_groups
from secateur.selection import Choice, Scope, choose
from secateur.shrink.select import Origins, Wanted
from secateur.surgery import Applied, Plan, Surgery, carry_out

Repair = Literal["parallel", "sequential"]
_POSITIONS = 64  # of an image that repair looks at; neighbours say nearly the same
_NOT_ASKED = "check=False"
_NO_OUTPUT = "the model returns no floating-point numbers to compare"


@dataclass(frozen=True)
class Asked:
    """The settings of one call that every step needs."""

    budget: Budget
    example: Any
    criterion: Criterion | GroupCriterion
    scope: Scope
    batches: Any
    loss: Loss | None
    repair: Repair | None
    check: bool
    optimizers: Sequence[Optimizer]


@dataclass(frozen=True)
class Step:
    """What one step did, and how to take it back.

    Attributes:
        plan: of its surgery.
        applied: what was done.
        repaired: errors of the layers that were fitted, None if none was.
        gain: what that did to the whole model, None if nothing was fitted.
        check: output against the dense model with the same units at zero, None if it was not compared.
        unproved: why it was not.
        notes: what a reader must know.
    """

    plan: Plan
    applied: Applied
    repaired: RepairReport | None
    gain: Gain | None
    check: Check | None
    unproved: str | None
    notes: tuple[str, ...]


def take_step(graph: Graph, origins: Origins, wanted: Wanted, limit: float, asked: Asked) -> Step:
    """Cut the model that `graph` describes until the cost is within `limit`.

    On an error the surgery is taken back; values that repair changed are the caller's to restore.
    """
    model = graph.model
    notes, chosen = _choose(graph, origins, wanted, limit, asked)
    surgery = Surgery({g: k for g, k in chosen.kept.items()})
    plan = surgery.plan()
    unproved = _why_not_compared(surgery, asked.check)
    plain = [] if unproved else oracle.outputs(model, graph.example)
    if not (plain or unproved):
        unproved = _NO_OUTPUT
    repaired, judge, gain = None, None, None
    before: dict[str, Tensor] = {}
    if asked.repair:
        keeps, slices = _features(plan)
        positions = Tokens(_POSITIONS)
        if keeps:
            data = as_batches(asked.batches, device_of(model), "Repair fits weights to data")
            judge = Judge(model, data, asked.loss)
            before = _repairable(model, keeps)
            repaired = repair_(
                model, keeps, asked.batches, slices=slices, mode=asked.repair, tokens=positions
            )
    twin = None if unproved else graph.masked_twin(surgery)
    expected = oracle.outputs(twin, graph.example) if twin is not None else []
    applied = carry_out(model, plan.cuts, asked.optimizers)
    check = None
    try:
        if twin is not None:
            check = _compared(twin, model, graph.example, plain, expected)
        if asked.repair and plan.cuts.tensors:
            reestimate_batchnorm_(model, asked.batches)
            if judge is not None:
                gain = _judged(model, judge, plain_values(plan, before), asked.batches)
                if not gain.kept:
                    notes.append(f"Repair was left out: {gain}.")
    except BaseException:
        applied.undo()
        raise
    return Step(plan, applied, repaired, gain, check, unproved, (*notes, *chosen.notes, *plan.notes))


def _repairable(model: nn.Module, keeps: Iterable[str]) -> dict[str, Tensor]:
    """Copies of what repair may change: weights, and the biases beside them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {*keeps, *(f"{name.rpartition('.')[0]}.bias".lstrip(".") for name in keeps)}
    return {name: parameters[name].detach().clone() for name in names if name in parameters}


def _judged(model: nn.Module, judge: Judge, plain: Mapping[str, Tensor], batches: Any) -> Gain:
    """Compare repaired weights with plain ones, and leave the better ones in the model."""
    with_repair = judge(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    repaired = put(model, plain)
    reestimate_batchnorm_(model, batches)
    gain = Gain(judge.what, judge(model), with_repair)
    if gain.kept:
        put(model, repaired)
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return gain


def _choose(
    graph: Graph, origins: Origins, wanted: Wanted, limit: float, asked: Asked
) -> tuple[list[str], Choice[Group]]:
    groups = wanted.groups(graph, origins)
    if not groups:
        raise BudgetError(
            f"At most {format_amount(limit)} {asked.budget.unit} cannot be reached: no group has a unit left "
            "that can go. Ask for more, or name further kinds."
        )
    scores = score_groups(graph.model, groups, graph.labels, asked.criterion, asked.batches, asked.loss)
    measured = asked.budget.quantity == "seconds"
    chosen = choose(
        {g: s.values for g, s in scores.items()},
        _cost_function(graph, asked),
        limit,
        asked.scope,
        clusters=graph.clusters(),
        constraints={g: wanted.constraint(g, origins[g]) for g in groups},
        alike={g: wanted.alike[origins[g]] for g in groups},
        price=(lambda kept: float(graph.cost(kept).macs)) if measured else None,
        measured=measured,
        unit=asked.budget.unit,
    )
    said: dict[str, list[Group]] = {}
    for group, score in scores.items():
        for note in score.notes:
            said.setdefault(note, []).append(group)
    return [f"{_named(found)}: {note}" for note, found in said.items()], chosen


def _named(groups: Sequence[Group]) -> str:
    """One group, or the first and how many more."""
    return str(groups[0]) + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")


def amount(budget: Budget, cost: Cost, measured: Measurement | None = None) -> float:
    """What the budget limits, of a model."""
    if budget.quantity == "macs":
        return float(cost.macs)
    if budget.quantity == "memory":
        return cost.memory(budget.batch, budget.context)
    if budget.quantity == "seconds":
        if measured is None or measured.latency is None:
            raise BudgetError("Budget.seconds needs an example input to time the model on.")
        return measured.latency.median
    return float(cost.params)


def _cost_function(graph: Graph, asked: Asked) -> Callable[[Mapping[Group, int]], float]:
    if asked.budget.quantity != "seconds":
        return lambda kept: amount(asked.budget, graph.cost(kept))

    def seconds(kept: Mapping[Group, int]) -> float:
        """Time of the model with so many units of each group, whichever: their number alone decides."""
        applied = Surgery({g: range(n) for g, n in kept.items()}).apply_()
        try:
            return amount(asked.budget, graph.cost(), measure(graph.model, asked.example))
        finally:
            applied.undo()

    return seconds


def _why_not_compared(surgery: Surgery, check: bool) -> str | None:
    if not check:
        return _NOT_ASKED
    inexact = [g for g, k in surgery.items() if len(k) < g.size and not g.exact]
    return f"removing units of {inexact[0]} is not the same as zeroing them" if inexact else None


def _compared(
    twin: nn.Module, model: nn.Module, example: Any, plain: list[Tensor], expected: list[Tensor]
) -> Check:
    """The proof; `SurgeryError` if it fails, which also a model does that gives another output each time."""
    got = oracle.outputs(model, example)
    check = Check(oracle.difference(expected, got), oracle.difference(plain, got), _tolerance(model))
    if check.ok:
        return check
    alone = oracle.difference(expected, oracle.outputs(twin, example))
    if alone > check.tolerance:
        raise SurgeryError(
            "The model does not repeat itself: two runs on the example, in evaluation mode, differ by "
            f"{alone:.1e} of the largest output, so that nothing can be proved. Take the randomness or the "
            "state out of its forward pass, or pass check=False."
        )
    raise SurgeryError(
        f"The smaller model does not do what the dense one does with the same units at zero: {check}."
    )


def _tolerance(model: nn.Module) -> float:
    """Rounding, in the model's own precision."""
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=1e-7)
    return max(1e-4, 100 * eps)


def _features(plan: Plan) -> tuple[dict[str, Tensor], dict[tuple[str, int], Tensor]]:
    """Masks over the inputs of consumers, and over everything else that is cut."""
    inputs = {(m.tensor, m.dim) for g in plan.surgery for m in g.members if m.role == "in"}
    keeps: dict[str, Tensor] = {}
    slices: dict[tuple[str, int], Tensor] = {}
    parameters = {s.name for s in plan.surgery.graph.types.stored.values() if s.is_parameter}
    for name, (shape, nodes) in plan.cuts.tensors.items():
        if name not in parameters:
            continue
        for dim in range(len(shape)):
            if isinstance(nodes[dim], int):
                continue
            mask = plan.keep(name, dim)
            if (name, dim) in inputs and name not in keeps:
                keeps[name] = mask
            else:
                slices[name, dim] = mask
    return keeps, slices
