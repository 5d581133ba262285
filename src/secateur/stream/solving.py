"""One block solved: layer after layer, each fitted to what the pruned ones before it pass on.

Shapes: O outputs, I inputs of a layer's matrix; x: inputs in the dense model, z: in the pruned one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import NonFiniteError, SecateurError, StatsError
from secateur.core.names import Expert, Target
from secateur.core.topk import count
from secateur.patterns import Pattern
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.measure import Rows, Tokens
from secateur.reconstruct.order import Inputs, Order, Stage, check_shared, listening, measuring, order_of
from secateur.reconstruct.passes import Enough
from secateur.solvers import Quadratic, Solver
from secateur.stream import ranks
from secateur.stream.sums import Sums
from secateur.stream.walk import Walk

_UNSEEN = "no token of the data reaches it, though it reaches its siblings: pruned by magnitude."


@dataclass(frozen=True, eq=False)
class Done:
    """What is known of a layer once its weights are in the model.

    Attributes:
        keep: mask `[out, in]`.
        error: squared error of its output over its power, with the weights as they are stored.
        notes: of the solver.
    """

    keep: Tensor
    error: float
    notes: tuple[str, ...]


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
    """

    solver: Solver
    pattern: Pattern
    shares: Mapping[str, float]
    correction: float | None = None
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.correction is not None and not self.correction > 0:
            raise SecateurError(f"correction is a damping, above 0; got {self.correction}.")

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """The weight as it will be read back."""
        return weight.to(self.stored.get(name, weight.dtype))


class Dense:
    """The dense model beside the pruned one: its walk, and the dense weights of the block at work."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._saved: list[tuple[Tensor, Tensor]] = []

    def enter(self, targets: Sequence[Target]) -> None:
        """Take the weights of a block before they are pruned."""
        self._saved = [(t.weight, t.weight.detach().clone()) for t in targets]

    @contextmanager
    def weights(self) -> Iterator[None]:
        """While this holds, the block has its dense weights."""
        pruned = [w.data for w, _ in self._saved]
        for w, saved in self._saved:
            w.data = saved
        try:
            yield
        finally:
            for (w, _), data in zip(self._saved, pruned, strict=True):
                w.data = data


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
        order, first = _order(walk, consumers)
    unseen = _unseen(order, consumers, job.solver)
    done: dict[str, Done] = {}
    for stages in _together(order, walk):
        if [stages[0]] == stages and first is not None and stages[0][0].name == first[0] and not dense:
            sums = {first[0]: first[1]}
        else:
            sums = _measure(walk, stages, order, dense)
        done |= _solve_(job, _groups(stages), sums, own)
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


def _stop(walk: Walk) -> int | None:
    """Passes end with the next block, if there is one."""
    return walk.done + 1 if walk.done < len(walk.chain.blocks) else None


def known_order(walk: Walk, consumers: Sequence[Consumer]) -> Order | None:
    """The order as the first example showed it, if each layer was called once and none has siblings."""
    heard = walk.chain.heard
    kinds = Counter(kind_of(c.name) for c in consumers)
    if any(len(heard.get(c.name, ())) != 1 or kinds[kind_of(c.name)] > 1 for c in consumers):
        return None
    by_name = {c.name: c for c in consumers}
    stages: dict[int, list[Consumer]] = {}
    for name, numbers in heard.items():  # in the order of first calls
        if name in by_name:
            stages.setdefault(numbers[0], []).append(by_name[name])
    once = dict.fromkeys(by_name, 1)
    return Order(tuple(tuple(stage) for stage in stages.values()), (once,) * len(walk.data))


@contextmanager
def called_once(walk: Walk, consumers: Sequence[Consumer]) -> Iterator[None]:
    """Raise `StatsError` if in what follows a layer is not called once for each batch, as it was at first."""
    calls: Counter[str] = Counter()

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        calls[consumer.name] += 1

    with listening(walk.model, consumers, hear):
        yield
    for c in consumers:
        if calls[c.name] != len(walk.data):
            raise StatsError(
                f"{c.name} is called once for the first example, but {calls[c.name]} times for "
                f"{len(walk.data)} batches, so it is not known what it takes in: exclude it with "
                "where=Where(exclude=...), or prune by a criterion."
            )


def _order(walk: Walk, consumers: Sequence[Consumer]) -> tuple[Order, tuple[str, Sums] | None]:
    """The order of layers, and what the first of them takes in, which no other has an influence on."""
    rows, sums = Rows(Tokens()), Sums()
    first: list[str] = []
    stop = _stop(walk)

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if not first:
            first.append(consumer.name)
        if consumer.name == first[0]:
            for (z,) in rows.blocks(module, x):
                sums.add(z)

    def run(i: int, batch: Any) -> None:
        rows.enter(batch)
        walk.run(i, stop)

    with listening(walk.model, consumers, hear):
        order = _agreed(order_of(walk.model, consumers, walk.data, run))
    if not first or (ranks.several() and len(set(ranks.gather(first[0]))) > 1):
        return order, None
    by_name = {c.name: c for c in consumers}
    sums.all_reduce(by_name[first[0]].inputs, walk.data_device)
    return order, (first[0], sums)


def _agreed(order: Order) -> Order:
    """The same stages in all processes: layers share their inputs only if they do in each of them."""
    if not ranks.several():
        return order
    at = [{c: k for k, names in enumerate(stages) for c in names} for stages in ranks.gather(_names(order))]
    consumers = {c.name: c for stage in order.stages for c in stage}
    everywhere = [name for stages in ranks.gather(_names(order)) for names in stages for name in names]
    if set(everywhere) - set(consumers):
        # Experts that this process has not seen; it takes part in their sums with zeros.
        raise StatsError("Ranks saw different layers.")
    stages: dict[tuple[Any, ...], list[Consumer]] = {}
    for name in dict.fromkeys(everywhere):
        stages.setdefault(tuple(a.get(name, name) for a in at), []).append(consumers[name])
    return Order(tuple(tuple(s) for s in stages.values()), order.calls)


def _names(order: Order) -> list[list[str]]:
    return [[c.name for c in stage] for stage in order.stages]


def _unseen(order: Order, consumers: Sequence[Consumer], solver: Solver) -> list[Consumer]:
    """Experts that no token reaches; raise `StatsError` for any other layer that is not called."""
    reached = {c.name for stage in order.stages for c in stage}
    kinds = {kind_of(name) for name in reached}
    missing = [c for c in consumers if c.name not in reached]
    for c in missing:
        if kind_of(c.name) == c.name or kind_of(c.name) not in kinds:
            raise StatsError(
                f"No batch reaches {c.name}, so {solver} cannot fit it to anything: exclude it with "
                "where=Where(exclude=...), or prune by a criterion"
                "."
            )
    return missing


def kind_of(name: str) -> str:
    """A name without the last of its numbers: that of an expert among its siblings."""
    if name.endswith("]"):
        return name[: name.rindex("[")] + "[*]"
    return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)


def _together(order: Order, walk: Walk) -> list[list[Stage]]:
    """Stages to measure in one pass: one by one, but experts all at once."""
    kinds: dict[tuple[str, ...], list[Stage]] = {}
    for stage in order.stages:
        kinds.setdefault(tuple(kind_of(c.name) for c in stage), []).append(stage)
    found: list[list[Stage]] = []
    for stages in kinds.values():
        if len(stages) > 1 and _independent(walk, stages):
            found.append(stages)
        else:
            found.extend([stage] for stage in stages)
    position = {c.name: k for k, stage in enumerate(order.stages) for c in stage}
    return sorted(found, key=lambda stages: position[stages[0][0].name])


def _independent(walk: Walk, stages: Sequence[Stage]) -> bool:
    """Whether the second of alike stages does not depend on the first: told by gradients of one pass."""
    a, b = stages[0][0], stages[1][0]
    if a.stack is not None and b.stack is not None:
        return True
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if consumer is b:
            inputs.append(x)

    holder = walk.model.get_submodule(a.holders[0])
    weight = holder.get_parameter(a.name.rpartition(".")[2])
    wanted = weight.requires_grad
    handle = holder.register_forward_hook(lambda m, args, out: outputs.append(out))
    try:
        weight.requires_grad_(True)
        for i in range(len(walk.data)):
            with measuring(walk.model), listening(walk.model, [b], hear), torch.enable_grad():
                walk.run(i, _stop(walk))
            if inputs and outputs:
                break
            inputs.clear()
            outputs.clear()
    finally:
        handle.remove()
        weight.requires_grad_(wanted)
    reached = [x for x in inputs if x.requires_grad]
    if not reached or not outputs:
        return True
    with torch.enable_grad():
        gradients = torch.autograd.grad([x.sum() for x in reached], outputs, allow_unused=True)
    return all(g is None for g in gradients)


def _groups(stages: Sequence[Stage]) -> list[list[Consumer]]:
    """Layers whose inputs are the same and unfolded alike."""
    found: list[list[Consumer]] = []
    for stage in stages:
        by_geometry: dict[tuple[Any, ...], list[Consumer]] = {}
        for c in stage:
            by_geometry.setdefault(c.geometry, []).append(c)
        found.extend(by_geometry.values())
    return found


def _measure(walk: Walk, stages: Sequence[Stage], order: Order, dense: Dense | None) -> dict[str, Sums]:
    """The sums of the first of each group, in one pass over the data."""
    groups = _groups(stages)
    everyone = [c for group in groups for c in group]
    leaders = {group[0].name: Sums() for group in groups}
    inputs, rows = Inputs(), Rows(Tokens())
    waiting: dict[str, list[Tensor]] = {}
    unpaired: set[str] = set()
    left: Counter[str] = Counter()

    def heard(consumer: Consumer) -> None:
        left[consumer.name] -= 1
        if not any(n > 0 for n in left.values()):
            raise Enough

    def keep(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        if consumer.name in leaders:
            waiting.setdefault(consumer.name, []).append(x.clone())
        heard(consumer)

    def add(consumer: Consumer, module: nn.Module, z: Tensor) -> None:
        inputs.hear(consumer, z)
        if consumer.name in leaders:
            x = waiting[consumer.name].pop(0) if waiting.get(consumer.name) else None
            if x is None or x.shape != z.shape:
                unpaired.add(consumer.name)
                for (part,) in rows.blocks(module, z):
                    leaders[consumer.name].add(part)
            else:
                for part, dense_part in rows.blocks(module, z, x):
                    leaders[consumer.name].add(part, dense_part)
        heard(consumer)

    with measuring(walk.model):
        for i, batch in enumerate(walk.data):
            rows.enter(batch)
            calls = Counter({c.name: order.calls[i].get(c.name, 0) for c in everyone})
            if not any(calls.values()):
                continue
            waiting.clear()
            if dense is not None:
                left = calls.copy()
                with dense.weights(), listening(walk.model, everyone, keep):
                    dense.walk.run(i, _stop(walk))
            left = calls.copy()
            with listening(walk.model, everyone, add):
                walk.run(i, _stop(walk))
    check_shared(groups, inputs)
    for group in groups:
        sums = leaders[group[0].name]
        if group[0].name in unpaired:
            sums.unpair()
        sums.all_reduce(group[0].inputs, walk.data_device)
    return leaders


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
