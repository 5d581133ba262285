"""Structured pruning to a budget: trace, score, choose, repair, cut, prove."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.batchnorm import reestimate_batchnorm_
from secateur.budget import Budget, format_amount, targets
from secateur.collect import Loss
from secateur.core.errors import BudgetError, SelectionError, SurgeryError
from secateur.core.names import unwrap
from secateur.criteria import Criterion, Magnitude
from secateur.graph import Check, Cost, Graph, Group, oracle
from secateur.measure import Measurement, as_call, measure
from secateur.progress import track
from secateur.reconstruct import RepairReport, Tokens, repair_
from secateur.scoring import GroupCriterion, score_groups
from secateur.selection import Constraint, Isomorphic, Scope, choose, constraints, signatures
from secateur.shrunk import GroupRecord, ShrinkReport
from secateur.surgery import Applied, Plan, Surgery, carry_out

DEFAULT_KINDS = ("neurons", "filters", "heads", "kv_groups", "queries")
"""What is cut unless asked otherwise: units inside blocks."""


Repair = Literal["parallel", "sequential"]
_POSITIONS = 64


@dataclass(frozen=True)
class _Asked:
    """The settings of one call that every step needs."""

    criterion: Criterion | GroupCriterion
    scope: Scope
    kinds: Collection[str] | None
    exclude: tuple[str, ...]
    given: Mapping[str, Any]
    batches: Any
    loss: Loss | None
    repair: Repair | None
    budget: Budget


def shrink_(
    model: nn.Module,
    example: Any,
    budget: Budget,
    *,
    criterion: Criterion | GroupCriterion | None = None,
    scope: Scope | None = None,
    kinds: Collection[str] | None = DEFAULT_KINDS,
    exclude: str | tuple[str, ...] = (),
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    multiple_of: int | Mapping[str, int] = 1,
    minimum: int | Mapping[str, int] = 1,
    maximum_sparsity: float | Mapping[str, float] = 1.0,
    sparsity: Mapping[str, float] | None = None,
    steps: int = 1,
    repair: Repair | None = "parallel",
    check: bool = True,
    optimizer: Optimizer | Iterable[Optimizer] = (),
) -> ShrinkReport:
    """Remove units from `model`, in place, until a budget holds. On any error the model is as it was.

    Units are neurons, filters, attention heads and the like, removed from every tensor that depends on them;
    the model stays an ordinary module, with smaller weights.

    Args:
        model: any module. Wrappers of `torch.compile` and data parallelism are looked through.
        example: an input: a tensor, a tuple of positional or a mapping of keyword arguments.
        budget: what may remain, such as `Budget.macs(0.5)`.
        criterion: what a unit is worth: a group criterion, or a criterion of weights, whose scores are summed
            over a unit's weights. `Magnitude()` if None.
        scope: what is compared with what: `Isomorphic()`, `Global()` or `Local()`. `Isomorphic()` if None.
        kinds: of groups that may be cut; None for all, the residual width too.
        exclude: glob patterns over names of groups or of their members: groups that stay whole.
        batches: data, for criteria that measure, and for repair.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.
        multiple_of: kept counts are multiples of this; by kind or name if a mapping. See `constraints`.
        minimum: units that stay in any case.
        maximum_sparsity: largest fraction of a group that may go.
        sparsity: fixed fractions, by kind or name.
        steps: score and cut in so many steps, each removing the same fraction.
        repair: fit the weights that stay to `batches`, if there are any: least squares for each consumer, and
            batch normalisation measured anew. "parallel" fits all layers to the dense model's inputs at once;
            "sequential" one after the other to what the repaired layers before pass on, which is better for
            deep convolution networks and takes a pass over the data for each layer. None leaves it out.
        check: prove the result: its output equals that of the dense model with the removed units at zero.
        optimizer: one or several, whose parameters and state follow.

    Returns:
        The report, with `cuts` to save and replay, and `undo()`.

    Raises:
        BudgetError: the budget cannot be met. SelectionError: nothing to cut. Others as from the criterion.
    """
    started = time.perf_counter()
    model = unwrap(model)
    args, kwargs = as_call(example)
    if isinstance(batches, Iterator):
        batches = list(batches)
    excluded = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    given = {
        "multiple_of": multiple_of,
        "minimum": minimum,
        "maximum_sparsity": maximum_sparsity,
        "sparsity": sparsity,
    }
    asked = _Asked(
        criterion or Magnitude(),
        scope or Isomorphic(),
        kinds,
        excluded,
        given,
        batches,
        loss,
        repair if batches is not None else None,
        budget,
    )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    before = measure(model, example)
    graph = Graph.trace(model, *args, **kwargs)
    dense = _amount(budget, graph.cost(), before)
    done: list[_Step] = []
    alike: dict[str, Any] = {}
    saved = _Saved(model if asked.repair else None)
    try:
        for limit in track(targets(budget.limit(dense), dense, steps), "shrinking", steps):
            alike = alike or _alike(graph)
            step = _step(graph, limit, example, asked, alike, optimizers, check)
            done.append(step)
            graph = _retraced(graph, step, args, kwargs)
        if asked.repair:
            reestimate_batchnorm_(model, asked.batches)
        after = measure(model, example)
    except BaseException:
        _undo(done, saved)
        raise
    return ShrinkReport(
        settings={
            "budget": budget.describe(),
            "criterion": repr(asked.criterion),
            "scope": repr(asked.scope),
            "kinds": "all" if kinds is None else ", ".join(sorted(kinds)),
            "steps": str(steps),
            "repair": asked.repair or ("no data" if repair else "none"),
        },
        groups=_records(done[0].graph, graph),
        frozen=tuple((f.reason, f.share) for f in done[0].graph.frozen()),
        before=before,
        after=after,
        asked=budget.limit(dense),
        got=_amount(budget, graph.cost(), after),
        check=done[-1].check if done else None,
        repairs=tuple(step.repaired for step in done if step.repaired is not None),
        notes=tuple(dict.fromkeys(n for step in done for n in step.notes)),
        seconds={"shrinking": time.perf_counter() - started},
        cuts=tuple(step.applied.cuts for step in done),
        take_back=lambda: _undo(done, saved),
    )


@dataclass(frozen=True)
class _Step:
    graph: Graph
    plan: Plan
    applied: Applied
    repaired: RepairReport | None
    check: Check | None
    notes: tuple[str, ...]


class _Saved:
    """Parameters and buffers as they were, which repair changes in place."""

    def __init__(self, model: nn.Module | None) -> None:
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        self._values = [(t, t.detach().clone()) for t in tensors]

    def put_back(self) -> None:
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _undo(done: list[_Step], saved: _Saved) -> None:
    """The very tensors, numbers and classes that there were, with their values."""
    for step in reversed(done):
        step.applied.undo()
    saved.put_back()


def _amount(budget: Budget, cost: Cost, measured: Measurement) -> float:
    """What the budget limits, of a model."""
    if budget.quantity == "macs":
        return float(cost.macs)
    if budget.quantity == "memory":
        return cost.memory(budget.batch, budget.context)
    if budget.quantity == "seconds":
        if measured.latency is None:
            raise BudgetError("Budget.seconds needs an example input to time the model on.")
        return measured.latency.median
    return float(cost.params)


def select_groups(graph: Graph, kinds: Collection[str] | None, exclude: tuple[str, ...] = ()) -> list[Group]:
    """Groups of these kinds whose clusters are complete; `SelectionError` if there is none.

    A group that one number in the code ties to a group that stays whole stays whole too.
    """
    chosen = [g for g in graph.groups() if kinds is None or g.kind in kinds]
    names = {g: [g.name, *(m.tensor for m in g.members)] for g in chosen}
    for glob in exclude:
        if not any(fnmatchcase(n, glob) for g in chosen for n in names[g]):
            raise SelectionError(f"exclude={glob!r} matches no group and none of their tensors.")
    left = [g for g in chosen if not any(fnmatchcase(n, glob) for n in names[g] for glob in exclude)]
    while True:
        have = set(left)
        broken = {g for c in graph.clusters() if not have.issuperset(c) for g in c}
        if not broken & have:
            break
        left = [g for g in left if g not in broken]
    if not left:
        found = sorted({g.kind for g in graph.groups()})
        raise SelectionError(
            f"No group of the kinds {', '.join(kinds or ('any',))} can be cut; the model has "
            f"{', '.join(found) or 'none'}. Graph.frozen() says why."
        )
    return left


def _step(
    graph: Graph,
    limit: float,
    example: Any,
    asked: _Asked,
    alike: Mapping[str, Any],
    optimizers: list[Optimizer],
    check: bool,
) -> _Step:
    """One round: the model that `graph` describes is cut."""
    model = graph.model
    groups = select_groups(graph, asked.kinds, asked.exclude)
    scores = score_groups(model, groups, graph.labels, asked.criterion, asked.batches, asked.loss)
    notes = [f"{g}: {n}" for g, s in scores.items() for n in s.notes]
    chosen = choose(
        {g: s.values for g, s in scores.items()},
        _cost_function(graph, example, asked.budget),
        limit,
        asked.scope,
        clusters=graph.clusters(),
        constraints=_constraints(groups, asked.given),
        alike={g: alike[g.name] for g in groups},
        price=(lambda kept: float(graph.cost(kept).macs)) if asked.budget.quantity == "seconds" else None,
        measured=asked.budget.quantity == "seconds",
        unit=asked.budget.unit,
    )
    surgery = Surgery({g: k for g, k in chosen.kept.items()})
    plan = surgery.plan()
    exact = check and all(g.exact for g, k in surgery.items() if len(k) < g.size)
    plain = oracle.outputs(model, graph.example) if exact else []
    repaired = None
    if asked.repair:
        keeps, slices = _features(plan)
        repaired = _repaired(model, keeps, slices, asked) if keeps else None
    expected = oracle.outputs(graph.masked_twin(surgery), graph.example) if exact else None
    applied = carry_out(model, plan.cuts, optimizers)
    proof = None
    if expected is not None:
        got = oracle.outputs(model, graph.example)
        proof = Check(oracle.difference(expected, got), oracle.difference(plain, got), _tolerance(model))
        if not proof.ok:
            applied.undo()
            raise SurgeryError(
                f"The smaller model does not do what the dense one does with the same units at zero: {proof}."
            )
    return _Step(graph, plan, applied, repaired, proof, (*notes, *chosen.notes, *plan.notes))


def _alike(graph: Graph) -> dict[str, Any]:
    """What each group of the dense model is like, by name: later it lies between other widths."""
    shapes = {s.name: tuple(s.tensor.shape) for s in graph.types.stored.values()}
    return {g.name: like for g, like in signatures(graph.groups(), shapes).items()}


def _tolerance(model: nn.Module) -> float:
    """Rounding, in the model's own precision."""
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=1e-7)
    return max(1e-4, 100 * eps)


def _cost_function(graph: Graph, example: Any, budget: Budget) -> Any:
    if budget.quantity != "seconds":
        nothing = Measurement(0, 0, 0, 0)
        return lambda kept: _amount(budget, graph.cost(kept), nothing)

    def seconds(kept: Mapping[Group, int]) -> float:
        """Time of the model with so many units of each group, whichever: their number alone decides."""
        applied = Surgery({g: range(n) for g, n in kept.items()}).apply_()
        try:
            return _amount(budget, graph.cost(), measure(graph.model, example))
        finally:
            applied.undo()

    return seconds


def _constraints(groups: list[Group], given: Mapping[str, Any]) -> dict[Group, Constraint]:
    """What was asked, and what the model's code can follow."""
    found = constraints(groups, **given)
    for g, c in found.items():
        if g.step > 1:
            c = replace(c, multiple_of=math.lcm(c.multiple_of, g.step))
        found[g] = replace(c, minimum=max(c.minimum, g.least)) if g.least > 1 else c
    return found


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


def _repaired(
    model: nn.Module, keeps: Mapping[str, Tensor], slices: Mapping[tuple[str, int], Tensor], asked: _Asked
) -> RepairReport:
    assert asked.repair is not None
    positions = Tokens(_POSITIONS)  # of an image; neighbours say nearly the same
    return repair_(model, keeps, asked.batches, slices=slices, mode=asked.repair, tokens=positions)


def _retraced(old: Graph, step: _Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Trace what came out: the proof that its code and its weights agree, in every size."""
    graph = Graph.trace(old.model, *args, **kwargs)
    expected, got = step.plan.after, graph.cost()
    if (expected.params, expected.macs) != (got.params, got.macs):
        raise SurgeryError(
            f"The smaller model has {format_amount(got.params)} parameters and {format_amount(got.macs)} MACs where "
            f"{format_amount(expected.params)} and {format_amount(expected.macs)} were planned."
        )
    return graph


def _records(dense: Graph, small: Graph) -> tuple[GroupRecord, ...]:
    sizes = {g.name: g.size for g in small.all_groups}
    # A group of which one unit is left has no dimension any more.
    return tuple(
        GroupRecord(
            g.name, g.kind, g.size, sizes.get(g.name, 1), len(g.members), g.inexact[0] if g.inexact else None
        )
        for g in dense.groups()
    )
