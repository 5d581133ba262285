"""The one entry: which passes the wanted statistics need, and running them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect.batches import Batch, Batches, Loss, as_batches
from secateur.collect.curvature import exact_diagonal, hessian_gradient, hutchinson_diagonal, mean_gradient
from secateur.collect.examples import measure_examples
from secateur.collect.flow import synaptic_flow
from secateur.collect.inputs import measure_inputs
from secateur.core.errors import NonFiniteError, StatsError
from secateur.core.modes import evaluation
from secateur.core.names import Target, Where, select, unwrap
from secateur.progress import track
from secateur.stats import (
    ActivationStat,
    ExactDiagonal,
    ExampleStat,
    GradMean,
    HessianGradient,
    HutchinsonDiagonal,
    LossStat,
    NameSeed,
    Stat,
    Stats,
    SynapticFlow,
)


@dataclass(frozen=True)
class Collected:
    """Statistics of each layer, by parameter name, and what a reader of the result must know."""

    stats: dict[str, Stats]
    notes: tuple[str, ...]


def collect(
    model: nn.Module,
    needs: Sequence[Stat],
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    where: Where | Sequence[Target] | None = None,
) -> Collected:
    """Measure `needs` of the selected layers: one pass for all inputs, one for all gradients of examples.

    The model runs in evaluation mode (dropout off, normalisation statistics fixed) and is left as it was:
    weights, buffers, gradients, modes, hooks, torch's random state. Memory: the statistics, the activations
    of one batch, and a block of per-example gradients of at most 4 MiB (or one example's) for one layer;
    before the first batch, the gradients of two examples.

    Gradients of single examples come from one backward pass a batch where layers are linear or convolutions
    and examples do not influence each other, which is tested; else, with a note, from one pass an example.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        needs: the stats to measure.
        batches: list or loader of `(inputs, target)` pairs, of mappings, or of tensors (for activations).
        loss: `loss(output, target)` -> mean over the batch. None: the model returns its loss.
        where: which layers; see `Where`.

    Raises:
        StatsError: no batches, a missing loss, or a statistic that a layer does not define.
        NonFiniteError: NaN or infinite activations or gradients.
    """
    model = unwrap(model)
    targets = select(model, where).targets if where is None or isinstance(where, Where) else tuple(where)
    needs = list(dict.fromkeys(needs))
    found: dict[str, dict[Stat, Tensor]] = {t.name: {} for t in targets}
    for t in targets:
        found[t.name].update({s: _name_seed(t.name) for s in needs if isinstance(s, NameSeed)})
    notes: list[str] = []
    on_data = [s for s in needs if not isinstance(s, NameSeed)]
    if on_data and targets:
        what = ", ".join(str(s) for s in on_data)
        data = as_batches(batches, targets[0].weight.device, f"{what} must be measured on data")
        with evaluation(model), same_randomness(targets):
            if activations := [s for s in on_data if isinstance(s, ActivationStat)]:
                seen = track(data, "measuring inputs", _length(data))
                _enter(found, measure_inputs(model, targets, activations, seen))
            with differentiable(model):
                if examples := [s for s in on_data if isinstance(s, ExampleStat)]:
                    seen = track(data, "measuring gradients", _length(data))
                    means, reason = measure_examples(model, targets, examples, seen, loss)
                    _enter(found, means)
                    if reason:
                        notes.append(f"Gradients were taken one example at a time: {reason}.")
                for stat in on_data:
                    if isinstance(stat, LossStat):
                        values = _loss_stat(model, targets, stat, data, loss)
                        for t, v in zip(targets, values, strict=True):
                            found[t.name][stat] = t.layout.matrix(v)
    _refuse_non_finite(found)
    return Collected({name: stats for name, stats in found.items()}, (*notes, *_idle(found)))


def _enter(found: dict[str, dict[Stat, Tensor]], more: Mapping[str, Mapping[Any, Tensor]]) -> None:
    for name, values in more.items():
        found[name].update(values)


def _loss_stat(
    model: nn.Module, targets: Sequence[Target], stat: LossStat, data: Batches, loss: Loss | None
) -> list[Tensor]:
    seen: Iterable[Batch] = track(data, f"measuring {type(stat).__name__}", _length(data))
    if isinstance(stat, GradMean):
        return mean_gradient(model, targets, seen, loss)
    if isinstance(stat, HutchinsonDiagonal):
        return hutchinson_diagonal(model, targets, seen, loss, stat)
    if isinstance(stat, ExactDiagonal):
        return exact_diagonal(model, targets, seen, loss, stat)
    if isinstance(stat, HessianGradient):
        return hessian_gradient(model, targets, data, loss, stat.temperature)
    if isinstance(stat, SynapticFlow):
        return synaptic_flow(model, targets, next(iter(data)))
    raise StatsError(f"{stat} is a statistic that collect does not know how to measure.")


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Frozen weights take gradients for the while; nothing is written to `.grad`."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def same_randomness(targets: Sequence[Target]) -> Iterator[None]:
    """Shuffling loaders and random layers draw from torch's generators, which are put back afterwards."""
    devices = {t.weight.device for t in targets if t.weight.is_cuda}
    with torch.random.fork_rng([*devices]):
        yield


def _length(data: Batches) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _name_seed(name: str) -> Tensor:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "little") >> 1)


def _refuse_non_finite(found: dict[str, dict[Stat, Tensor]]) -> None:
    for name, stats in found.items():
        for stat, value in stats.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"{stat} of {name} is not finite: look for NaN or overflow in the data or the loss."
                )


def _idle(found: dict[str, dict[Stat, Tensor]]) -> Iterator[str]:
    """Notes on layers that the data says nothing about."""
    for name, stats in found.items():
        for stat, value in stats.items():
            if not isinstance(stat, NameSeed) and not bool(value.any()):
                yield f"{stat} of {name} is 0 everywhere: on this data nothing tells its weights apart."
