"""One-shot pruning of any module, in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import Allocation, Layer, uniform
from secateur.collect import Collected, Loss, collect
from secateur.core.bulk import zero_
from secateur.core.errors import (
    BudgetError,
    NonFiniteError,
    PatternError,
    SecateurError,
    SparsityError,
    StatsError,
)
from secateur.core.names import Selection, Target, Where, select, unwrap
from secateur.core.topk import count
from secateur.criteria import Criterion, Wanda
from secateur.masks import Masks
from secateur.measure import measure, zeros
from secateur.oneshot import problem_of, solve_
from secateur.patterns import Pattern, Unstructured
from secateur.record import LayerRecord, Report
from secateur.solvers import Solver
from secateur.stats import Stats
from secateur.stream.tuning import Reconstruct, error_notes, gain_notes


def prune_(
    model: nn.Module,
    criterion: Criterion | Solver,
    sparsity: float | None = None,
    *,
    pattern: Pattern | None = None,
    allocation: Allocation = uniform,
    where: Where | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    stats: Collected | None = None,
    rounds: int | None = None,
    correction: float | None = None,
    reconstruct: Reconstruct | None = None,
    example: Any = None,
) -> Report:
    """Set the lowest-scored weights to zero, in place. On any error the model is bit-identical to before.

    `sparsity` is the fraction of the selected layers' weights that go, exactly
    `floor(sparsity * weights + 1/2)` of them (in whole blocks for `Block`). Weights that are zero already go
    first.

    Args:
        model: any module. Wrappers of `torch.compile` and data parallelism are looked through.
        criterion: what a weight is worth; `secateur.criteria`. Or a solver, `SparseGPT()` or `ALPS()`, which
            also changes the weights that stay: layer after layer in the order in which the model runs them,
            each is fitted to what the pruned ones before it pass on. Needs batches. An allocation that ranks
            scores gets those of `Wanda` on the dense model.
        sparsity: fraction to remove, in [0, 1]. None where the allocation decides (`custom`, `Threshold(q)`).
        pattern: which entries may survive; `Unstructured()` if None.
        allocation: how much from each layer: `uniform`, `global_`, `erk`, `lamp`, `owl`, `threshold` or
            `custom(...)`.
        where: which layers; see `Where`. Norms, biases, embeddings and the output head are left alone unless
            asked.
        batches: data for criteria that need statistics; see `collect`.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.
        stats: what `collect` measured earlier on this model, instead of batches.
        rounds: score and prune in so many steps, the density falling geometrically; the criterion's own
            number if None.
        correction: for a solver: fit each layer to what the dense model's layer gives on the dense model's
            own inputs, not on those that the pruned layers before pass on, so that it makes up for what was
            lost before it; by a ridge regression with this damping, relative to the mean of the Gram
            matrix's diagonal (0.01 is usual). The passes take twice as long.
        reconstruct: for a solver: tune the kept weights of each block when its layers are pruned.
        example: an input; with it, multiply-accumulates and latency are measured before and after.

    Returns:
        The report; `report.masks` holds the masks.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.
    """
    started = time.perf_counter()
    refuse_class(criterion)
    refuse_class(pattern)
    if not isinstance(criterion, Criterion | Solver):
        raise SecateurError(f"prune_ takes a criterion such as Magnitude() or a solver; got {criterion!r}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise SparsityError(f"Sparsity is the fraction removed, between 0 and 1; got {sparsity}.")
    rounds = getattr(criterion, "rounds", 1) if rounds is None else rounds
    if stats is not None and rounds > 1:
        raise StatsError("Several rounds measure anew after each: pass batches= instead of stats=.")
    if rounds < 1 or (rounds > 1 and sparsity is None):
        raise SecateurError("rounds is at least 1, and several rounds need a sparsity to go to.")
    pattern = pattern or Unstructured()
    model = unwrap(model)
    solver = None if isinstance(criterion, Criterion) else criterion
    selection = select(model, where, experts=solver is not None)
    check_targets(selection.targets, pattern)
    if solver is None and (correction is not None or reconstruct is not None):
        raise SecateurError("correction and reconstruct fit weights, which only a solver does.")
    if correction is not None and not correction > 0:
        raise SecateurError(f"correction is a damping, above 0; got {correction}.")
    if solver is not None and (loss is not None or stats is not None or rounds > 1):
        raise SecateurError(f"{solver} measures layer by layer, once: loss, stats and rounds play no part.")
    before = measure(model, example)
    if (rounds > 1 or solver is not None) and isinstance(batches, Iterator):
        batches = list(batches)  # every round, every layer, reads them again
    errors: Mapping[str, float] = {}
    # A solver writes as it goes; a pass on pruned weights can fail where that on the dense ones did not.
    careful = solver is not None or example is not None
    with undone_on_error(selection.targets) if careful else nullcontext():
        if solver is not None:
            problem = problem_of(model, selection, solver, where, batches)
            selection = problem.selection
            layers = _wanda(model, selection.targets, pattern, batches)
            shares = shares_of(layers, allocation, sparsity)
            solved, walked = solve_(model, problem, solver, pattern, shares, correction, reconstruct)
            keep = {name: found.keep for name, found in solved.items()}
            errors = {name: found.error for name, found in solved.items()}
            notes = (*walked, *_of_layers({name: found.notes for name, found in solved.items()}))
            gains = [found.tuned for found in solved.values() if found.tuned is not None]
            notes = (*notes, *error_notes(correction, reconstruct), *gain_notes(gains))
        else:
            assert isinstance(criterion, Criterion)

            def measured() -> Collected:
                return stats or collect(model, criterion.needs, batches, loss, selection.targets)

            choose = partial(choose_masks, selection.targets, criterion, pattern, allocation, measured)
            if rounds == 1:
                keep, shares, notes = choose(sparsity)
            else:
                keep, shares, notes = _in_rounds(selection.targets, choose, sparsity, rounds)
        masks = Masks({t.name: t.layout.restore(keep[t.name], t.weight.shape) for t in selection.targets})
        masks.apply_(model)
        selected = time.perf_counter()
        after = measure(model, example)
    records = records_of(selection, masks, shares, errors)
    settings = {
        "criterion": repr(criterion),
        "sparsity": "as allocated" if sparsity is None else repr(sparsity),
        "pattern": repr(pattern),
        "allocation": getattr(allocation, "__name__", repr(allocation)),
    }
    if where is not None:
        settings["where"] = repr(where)
    if rounds > 1:
        settings["rounds"] = repr(rounds)
    if correction is not None:
        settings["correction"] = repr(correction)
    if reconstruct is not None:
        settings["reconstruct"] = repr(reconstruct)
    return Report(
        settings,
        records,
        selection.skipped,
        before,
        after,
        (*notes, *remarks(records)),
        {"pruning": selected - started, "measuring": time.perf_counter() - selected},
        masks,
    )


@contextmanager
def undone_on_error(targets: Sequence[Target]) -> Iterator[None]:
    """Put the weights back if the body raises."""
    saved = [t.weight.detach().clone() for t in targets]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for t, weight in zip(targets, saved, strict=True):
                t.weight.copy_(weight)
        raise


Chosen = tuple[dict[str, Tensor], dict[str, float], tuple[str, ...]]  # masks, sparsities, notes


def refuse_class(setting: object) -> None:
    """Raise `SecateurError` for `Magnitude` where `Magnitude()` is meant."""
    if isinstance(setting, type):
        name = setting.__name__
        raise SecateurError(f"{name} is a class, not one of its instances: pass {name}(...) instead.")


def check_targets(targets: Sequence[Target], pattern: Pattern) -> None:
    """Raise `PatternError` or `NonFiniteError` for a layer that cannot be pruned."""
    for t in targets:
        pattern.check(t.shape, t.run, t.name)
        low, high = t.weight.detach().aminmax()
        if not math.isfinite(low) or not math.isfinite(high):
            raise NonFiniteError(
                f"{t.name} holds NaN or infinite weights: repair it, or leave it out with "
                f"where=Where(exclude={t.name!r})."
            )


def choose_masks(
    targets: Sequence[Target],
    criterion: Criterion,
    pattern: Pattern,
    allocation: Allocation,
    measured: Callable[[], Collected],
    sparsity: float | None,
) -> Chosen:
    """Masks in matrix layout, without touching the model."""
    collected = measured()
    layers = [as_layer(t, criterion, collected.stats.get(t.name, {}), pattern) for t in targets]
    return *masks_of(layers, pattern, allocation, sparsity), collected.notes


def masks_of(
    layers: Sequence[Layer], pattern: Pattern, allocation: Allocation, sparsity: float | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Masks in matrix layout, of the scores that the layers have, and the sparsity of each."""
    shares = shares_of(layers, allocation, sparsity)
    keep = {}
    for layer in layers:
        pattern.reachable(layer.shape, shares[layer.name])
        keep[layer.name] = pattern.keep(layer.scores(), shares[layer.name])
    return keep, shares


def as_layer(target: Target, criterion: Criterion, stats: Stats, pattern: Pattern) -> Layer:
    """A layer whose scores are the criterion's, checked, with the weights that are zero already at `-inf`."""
    has_zeros = zeros(target.weight) > 0

    def scores() -> Tensor:
        weight = target.matrix
        score = criterion(weight, stats)
        if score.shape != weight.shape:
            raise SecateurError(
                f"{criterion} gave scores of shape {tuple(score.shape)} for {target.name}, a matrix of "
                f"{tuple(weight.shape)}."
            )
        if not bool(score.amax() < torch.inf):  # NaN too; minus infinity is a score, "goes first"
            raise NonFiniteError(
                f"{criterion} gave NaN or infinite scores for {target.name}: leave it out with "
                f"where=Where(exclude={target.name!r}), or use another criterion."
            )
        # A weight that is zero already costs nothing to remove and must count towards the total. Not in
        # place: a criterion may have returned the weight itself, or a statistic.
        return score.masked_fill(weight == 0, -torch.inf) if has_zeros else score

    def weight() -> Tensor:
        return target.matrix.to(torch.promote_types(target.weight.dtype, torch.float32))

    return Layer(target.name, target.shape, target.weight.shape, pattern, weight, scores)


def _wanda(
    model: nn.Module, targets: Sequence[Target], pattern: Pattern, batches: Iterable[Any] | None
) -> list[Layer]:
    """Layers for the allocation of a solver; those that rank scores get Wanda's, of the dense model.

    These take a pass over the data, when they are first asked for.
    """
    found: list[Collected] = []

    def layer(target: Target) -> Layer:
        def scores() -> Tensor:
            if not found:
                found.append(collect(model, Wanda().needs, batches, None, targets))
            return as_layer(target, Wanda(), found[0].stats[target.name], pattern).scores()

        return replace(as_layer(target, Wanda(), {}, pattern), scores=scores)

    return [layer(target) for target in targets]


def _of_layers(notes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Each note once, with the layers that it is about."""
    about: dict[str, list[str]] = {}
    for name, said in notes.items():
        for note in said:
            about.setdefault(note, []).append(name)
    more = {note: f" and {len(names) - 1} more" if len(names) > 1 else "" for note, names in about.items()}
    return tuple(f"{names[0]}{more[note]}: {note}" for note, names in about.items())


def shares_of(layers: Sequence[Layer], allocation: Allocation, sparsity: float | None) -> dict[str, float]:
    """The sparsity of each layer, checked."""
    shares = allocation(layers, sparsity)
    _check_shares(layers, shares, sparsity)
    return shares


def _check_shares(layers: Sequence[Layer], shares: Mapping[str, float], sparsity: float | None) -> None:
    """An allocation, ours or a user's, must cover every layer and meet the total."""
    for layer in layers:
        if not 0 <= shares.get(layer.name, math.nan) <= 1:
            raise BudgetError(
                f"The allocation gave {layer.name} a sparsity of {shares.get(layer.name)}, outside [0, 1]."
            )
    if sparsity is None:
        return
    units = sum(layer.units for layer in layers)
    got = sum(count(shares[layer.name], layer.units) for layer in layers)
    # Custom allocations round in each layer; the built-in ones meet the total exactly.
    if abs(got - count(sparsity, units)) > len(layers):
        asked = count(sparsity, units)
        raise BudgetError(f"The allocation removes {got} of {units} units instead of {asked}.")


def _in_rounds(
    targets: Sequence[Target], choose: Callable[[float], Chosen], sparsity: float | None, rounds: int
) -> Chosen:
    """Score, prune, score again; the weights are put back before returning."""
    assert sparsity is not None
    saved = [t.weight.detach().clone() for t in targets]
    try:
        for i in range(1, rounds + 1):
            # Density d^(i/n); the last round is the asked sparsity itself, without rounding noise.
            chosen = _one_round(
                choose, sparsity if i == rounds else 1 - (1 - sparsity) ** (i / rounds), rounds
            )
            for t in targets:
                zero_(t.weight, t.layout.restore(chosen[0][t.name], t.weight.shape))
        return chosen
    finally:
        with torch.no_grad():
            for t, weight in zip(targets, saved, strict=True):
                t.weight.copy_(weight)


def _one_round(choose: Callable[[float], Chosen], sparsity: float, rounds: int) -> Chosen:
    try:
        return choose(sparsity)
    except PatternError as error:
        raise PatternError(
            f"In {rounds} rounds the sparsity grows from 0 and is {sparsity:.4g} on the way, where: {error} "
            "Or prune in one step with rounds=1."
        ) from None


def records_of(
    selection: Selection, masks: Masks, shares: Mapping[str, float], errors: Mapping[str, float]
) -> tuple[LayerRecord, ...]:
    """What became of each layer."""
    records = []
    for t in selection.targets:
        mask = masks[t.name]
        removed = mask.numel() - int(mask.count_nonzero())
        gone, error = zeros(t.weight), errors.get(t.name)
        records.append(LayerRecord(t.name, tuple(mask.shape), shares[t.name], removed, gone, error))
    return tuple(records)


def remarks(layers: Sequence[LayerRecord]) -> tuple[str, ...]:
    """What a reader of a report must know: zeros save nothing, layers that are empty, zeros of before."""
    notes = ["Zeros in dense tensors: files and dense kernels do not get smaller or faster by themselves."]
    for layer in layers:
        if layer.removed == layer.entries:
            notes.append(f"{layer.name} has no weight left: nothing passes through this layer any more.")
    natural = sum(layer.zeros - layer.removed for layer in layers)
    if natural:
        notes.append(f"{natural:,} weights that the masks keep were zero before and still are.")
    return tuple(notes)
