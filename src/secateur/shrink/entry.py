"""`shrink_`: steps of structured pruning until a budget holds, all or none."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.budget import Budget, format_amount, targets
from secateur.collect import Loss
from secateur.core.errors import BudgetError, SecateurError, SurgeryError
from secateur.core.names import unwrap
from secateur.criteria import Criterion, Magnitude
from secateur.graph import Check, Graph, Group
from secateur.measure import as_call
from secateur.progress import track
from secateur.scoring import GroupCriterion
from secateur.selection import Isomorphic, Scope
from secateur.shrink.select import Origins, Wanted, follow
from secateur.shrink.steps import Asked, Repair, Step, amount, take_step
from secateur.shrunk import Costs, GroupRecord, ShrinkReport

DEFAULT_KINDS = ("neurons", "filters", "heads", "kv_groups", "queries")
"""What is cut unless asked otherwise: units inside blocks."""


def shrink_(
    model: nn.Module,
    example: Any,
    budget: Budget,
    *,
    criterion: Criterion | GroupCriterion | None = None,
    scope: Scope | None = None,
    kinds: str | Collection[str] | None = DEFAULT_KINDS,
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
            deep networks and takes longer. Kept only if the smaller model's loss on the batches (or, without
            a loss, the distance of its outputs from the dense ones) is no larger than with plain removal;
            the report says both. None leaves it out.
        check: prove the result: its output equals that of the dense model with the removed units at zero.
        optimizer: one or several, whose parameters and state follow.

    Returns:
        The report, with `cuts` to save and replay, and `undo()`.

    Raises:
        BudgetError: the budget cannot be met. SelectionError: nothing to cut. SurgeryError: the code cannot
            follow, or the proof fails. Others as from the criterion.
    """
    started = time.perf_counter()
    check_choices(budget, scope, repair)
    model = unwrap(model)
    if isinstance(batches, Iterator):
        batches = list(batches)
    asked = Asked(
        budget,
        example,
        criterion if criterion is not None else Magnitude(),
        scope if scope is not None else Isomorphic(),
        batches,
        loss,
        repair if batches is not None else None,
        check,
        [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer),
    )
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    before = Costs.of(model, example)
    args, kwargs = as_call(example)
    dense = Graph.trace(model, *args, **kwargs)
    given = {
        "multiple_of": multiple_of,
        "minimum": minimum,
        "maximum_sparsity": maximum_sparsity,
        "sparsity": sparsity,
    }
    wanted = Wanted.of(dense, kinds, (exclude,) if isinstance(exclude, str) else tuple(exclude), given)
    done, saved = _Done(dense), _Saved(model if asked.repair else None)
    whole = amount(budget, dense.cost(), before.measured)
    try:
        for limit in track(targets(budget.limit(whole), whole, steps), "shrinking", steps):
            done.add(take_step(done.graph, done.origins, wanted, limit, asked))
        after = Costs.of(model, example)
    except BaseException:
        done.undo(saved)
        raise
    settings = {
        "budget": budget.describe(),
        "criterion": repr(asked.criterion),
        "scope": repr(asked.scope),
        "kinds": "all" if kinds is None else ", ".join(sorted(kinds)),
        "steps": str(steps),
        "repair": asked.repair or ("no data" if repair else "none"),
    }
    return _report(settings, budget, done, saved, before, after, time.perf_counter() - started)


def check_choices(budget: Any, scope: Any, repair: Any) -> None:
    """Mistakes that would otherwise show late, or not at all."""
    if not isinstance(budget, Budget):
        raise BudgetError(f"shrink_ takes a budget, such as Budget.macs(0.5); got {budget!r}.")
    if budget.quantity == "sparsity":
        raise BudgetError(
            "shrink_ takes what may remain of parameters, MACs, memory or seconds, such as "
            "Budget.params(0.5): Budget.sparsity counts weights that become zero."
        )
    if isinstance(scope, type):
        raise SecateurError(f"Pass {scope.__name__}(), not the class {scope.__name__}.")
    if scope is not None and not isinstance(scope, Scope):
        raise SecateurError(f"scope=... is Isomorphic(), Global() or Local(); got {scope!r}.")
    if repair is not None and repair not in get_args(Repair):
        raise SecateurError(f'repair=... is "parallel", "sequential" or None; got {repair!r}.')


class _Done:
    """The steps so far, the graph of what they left, and how many units of each dense group that is."""

    def __init__(self, dense: Graph) -> None:
        self.dense = self.graph = dense
        self.origins: Origins = {g: g for g in dense.all_groups}
        self.steps: list[Step] = []
        self.kept: dict[Group, int] = {g: g.size for g in dense.groups()}

    def add(self, step: Step) -> None:
        """Count what a step did, and trace what it left."""
        self.steps.append(step)
        for g, units in step.plan.surgery.items():
            self.kept[self.origins[g]] = len(units)
        graph = _retraced(step)
        self.origins = follow(self.origins, step.plan, graph)
        self.graph = graph

    def undo(self, saved: _Saved) -> None:
        """The very tensors, numbers and classes that there were, with their values."""
        for step in reversed(self.steps):
            step.applied.undo()
        saved.put_back()


class _Saved:
    """Parameters and buffers as they were, which repair changes in place."""

    def __init__(self, model: nn.Module | None) -> None:
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        self._values = [(t, t.detach().clone()) for t in tensors]

    def put_back(self) -> None:
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _retraced(step: Step) -> Graph:
    """Trace what came out: the proof that its code and its weights agree, in every size."""
    old = step.plan.surgery.graph
    args, kwargs = old.example
    graph = Graph.trace(old.model, *args, **kwargs)
    expected, got = step.plan.after, graph.cost()
    if (expected.params, expected.macs) != (got.params, got.macs):
        raise SurgeryError(
            f"The smaller model has {format_amount(got.params)} parameters and {format_amount(got.macs)} "
            f"MACs where {format_amount(expected.params)} and {format_amount(expected.macs)} were planned."
        )
    return graph


def _report(
    settings: Mapping[str, str],
    budget: Budget,
    done: _Done,
    saved: _Saved,
    before: Costs,
    after: Costs,
    seconds: float,
) -> ShrinkReport:
    groups = (
        GroupRecord(g.name, g.kind, g.size, done.kept[g], len(g.members), g.inexact[0] if g.inexact else None)
        for g in done.dense.groups()
    )
    check, unproved = _verdict(done.steps)
    return ShrinkReport(
        settings=settings,
        groups=tuple(groups),
        frozen=tuple((f.reason, f.share) for f in done.dense.frozen()),
        before=before.measured,
        after=after.measured,
        operators_before=before.operators,
        operators_after=after.operators,
        why_not_faster=after.slower_than_expected(before),
        asked=budget.limit(amount(budget, done.dense.cost(), before.measured)),
        got=amount(budget, done.graph.cost(), after.measured),
        check=check,
        unproved=unproved,
        repairs=tuple(step.repaired for step in done.steps if step.repaired is not None),
        gains=tuple(step.gain for step in done.steps if step.gain is not None),
        notes=tuple(dict.fromkeys(n for step in done.steps for n in step.notes)),
        seconds={"shrinking": seconds},
        cuts=tuple(step.applied.cuts for step in done.steps),
        take_back=lambda: done.undo(saved),
    )


def _verdict(steps: Sequence[Step]) -> tuple[Check | None, str | None]:
    """The worst comparison, or why not all steps could be compared."""
    unproved = next((step.unproved for step in steps if step.unproved), None)
    checks = [step.check for step in steps if step.check is not None]
    return (None, unproved) if unproved else (max(checks, key=lambda c: c.error), None)
