"""One block solved: layer after layer, each fitted to what the pruned ones before it pass on.

Shapes: O outputs, I inputs of a layer's matrix; x: inputs in the dense model, z: in the pruned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.core.errors import NonFiniteError, SecateurError, StatsError
from secateur.core.names import Expert, Target
from secateur.core.topk import count
from secateur.patterns import Pattern
from secateur.reconstruct.consumers import Consumer
from secateur.solvers import Quadratic, Solver
from secateur.stream import ranks
from secateur.stream.measuring import Dense, sums_of
from secateur.stream.stages import groups_of, known_order, order_behind, together, unseen_of
from secateur.stream.sums import Sums
from secateur.stream.walk import Walk

_UNSEEN = "no token of the data reaches it: pruned by magnitude."


@dataclass(frozen=True, eq=False)
class Done:
    """What is known of a layer once its weights are in the model.

    Attributes:
        keep: mask `[out, in]`.
        error: squared error of its output over its power, with the weights as they are stored.
        notes: of the solver.
        tuned: for the first layer of a block that was tuned, the gain that `reconstruct_` returns.
    """

    keep: Tensor
    error: float
    notes: tuple[str, ...]
    tuned: float | None = None


@dataclass(frozen=True)
class Job:
    """What is to be done to every layer.

    Attributes:
        solver: chooses the weights that go, and fits the others.
        pattern: which may survive.
        shares: the sparsity of each layer.
        stored: types in which weights will be stored, where that is not the type in which they are at work.
        correction: damping of the shift of the target towards what the dense model would pass on; None
            leaves the target alone.
        each: what is done with a layer instead of pruning it, for a measurement.
    """

    solver: Solver
    pattern: Pattern
    shares: Mapping[str, float]
    correction: float | None = None
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    each: Callable[[Target, Quadratic], Done] | None = None

    def __post_init__(self) -> None:
        if self.correction is not None and not self.correction > 0:
            raise SecateurError(f"correction is a damping, above 0; got {self.correction}.")

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """The weight as it will be read back."""
        return weight.to(self.stored.get(name, weight.dtype))


def solve_block_(
    job: Job,
    walk: Walk,
    consumers: Sequence[Consumer],
    targets: Mapping[str, Target],
    dense: Dense | None = None,
) -> dict[str, Done]:
    """Prune the layers that stand behind the blocks that are done, before the next one returns, in place.

    Layers that take in the same tensor share their Gram matrix and what is derived from it; experts, none of
    which hears of another, are measured in one pass.

    Raises:
        StatsError: a layer that no batch reaches, unless it is one of several experts.
        NonFiniteError: NaN or infinite inputs.
    """
    job, own = _with_experts(job, consumers, targets)
    order, first = known_order(walk, consumers), None
    if order is None:
        order, first = order_behind(walk, consumers)
    unseen = unseen_of(order, consumers, job.solver)
    done: dict[str, Done] = {}
    for stages in together(order, walk):
        if [stages[0]] == stages and first is not None and stages[0][0].name == first[0] and not dense:
            sums = {first[0]: first[1]}
        else:
            sums = sums_of(walk, stages, order, dense)
        done |= _solve_(job, groups_of(stages), sums, own)
    for c in unseen:
        done[c.name] = _solve_unseen_(job, own[c.name])
    return _stacked(done, consumers)


def _with_experts(
    job: Job, consumers: Sequence[Consumer], targets: Mapping[str, Target]
) -> tuple[Job, dict[str, Target]]:
    """The matrices to solve, by consumer; experts of a stack have shares that add up to that of the stack."""
    own = {c.name: targets[c.name] for c in consumers if c.stack is None}
    shares, stored = dict(job.shares), dict(job.stored)
    for stack in dict.fromkeys(c.stack for c in consumers if c.stack is not None):
        t = targets[stack]
        experts = len(t.weight)
        units = t.weight[0].numel() // job.pattern.unit
        least, more = divmod(count(job.shares[stack], experts * units), experts)
        for e in range(experts):
            name = f"{stack}[{e}]"
            own[name] = Expert(name, t.module, t.attribute, t.layout, e)
            shares[name] = (least + (e < more)) / units
            stored |= {name: job.stored[stack]} if stack in job.stored else {}
    return replace(job, shares=shares, stored=stored), own


def _stacked(done: Mapping[str, Done], consumers: Sequence[Consumer]) -> dict[str, Done]:
    """Experts put together to what the parameter holds; its error is the mean of theirs."""
    found = {c.name: done[c.name] for c in consumers if c.stack is None}
    stacks: dict[str, list[Consumer]] = {}
    for c in consumers:
        if c.stack is not None:
            stacks.setdefault(c.stack, []).append(c)
    for stack, experts in stacks.items():
        parts = [done[c.name] for c in sorted(experts, key=lambda c: c.expert)]
        notes = [f"expert {i}: {note}" for i, part in enumerate(parts) for note in part.notes]
        error = math.fsum(part.error for part in parts) / len(parts)
        found[stack] = Done(torch.cat([part.keep for part in parts]), error, tuple(notes))
    return found


def _solve_(
    job: Job, groups: Sequence[Sequence[Consumer]], sums: Mapping[str, Sums], targets: Mapping[str, Target]
) -> dict[str, Done]:
    """Solve the layers of a stage, each by one of the processes."""
    done: dict[str, Done] = {}
    number = 0
    owners: dict[str, int] = {}
    for group in groups:
        found = sums[group[0].name]
        objective: Quadratic | None = None
        for c in group:
            owners[c.name] = number % ranks.count()
            number += 1
            if owners[c.name] != ranks.rank():
                continue
            if not found.tokens:  # called, but with nothing
                done[c.name] = _solve_unseen_(job, targets[c.name])
                continue
            try:
                objective = objective or Quadratic(found.gram, job.solver.damping)
                done[c.name] = _solve_one_(job, targets[c.name], objective, found.cross)
            except (NonFiniteError, StatsError) as error:
                raise type(error)(f"{c.name}: {error}") from None
    return {name: _shared_(targets[name], done.get(name), owner) for name, owner in owners.items()}


def _shared_(target: Target, done: Done | None, owner: int) -> Done:
    """The layer as the process that solved it has it."""
    if not ranks.several():
        assert done is not None
        return done
    ranks.send_(target.weight.data, owner)
    keep = done.keep.contiguous() if done else torch.empty(target.shape, dtype=torch.bool)
    ranks.send_(keep, owner)
    error, notes = ranks.share((done.error, done.notes) if done else (0.0, ()), owner)
    return Done(keep, error, notes)


def _solve_one_(job: Job, target: Target, objective: Quadratic, cross: Tensor | None) -> Done:
    if job.each is not None:
        return job.each(target, objective)
    dense = target.matrix.float().clone()
    if job.correction is not None and cross is not None:
        dense = corrected(dense, objective, cross, job.correction)
    solved = job.solver(dense, objective, job.pattern, job.shares[target.name])
    with torch.no_grad():
        restored = target.layout.restore(solved.weight, target.weight.shape)
        target.weight.copy_(job.rounded(target.name, restored))
    return Done(solved.keep, objective.error(target.matrix.float(), dense), solved.notes)


def _solve_unseen_(job: Job, target: Target) -> Done:
    """By magnitude: a Gram matrix that says nothing."""
    nothing = Quadratic(torch.eye(target.shape[1], device=target.weight.device), job.solver.damping)
    done = _solve_one_(job, target, nothing, None)
    return Done(done.keep, done.error, (*done.notes, _UNSEEN))


def corrected(W_OI: Tensor, objective: Quadratic, cross_II: Tensor, damping: float) -> Tensor:
    r"""Weights that give on the pruned model's inputs $z$ what the dense ones $W$ give on its own, $x$.

    $$ W' = W + W (E[x z^T] - E[z z^T]) (E[z z^T] + \lambda I)^{-1} $$

    the ridge regression of $W x - W z$ on $z$: with much damping, or where both models pass on the same, it
    is $W$.
    """
    gram = objective.gram_II
    shifted = gram.double()
    shifted.diagonal().add_(damping * float(gram.diagonal().mean()))
    shift = (W_OI @ (cross_II - gram)).double()
    return W_OI + torch.linalg.solve(shifted, shift.T).T.float()
