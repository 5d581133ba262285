"""Repairing a whole model after inputs of its layers were chosen for removal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from secateur.collect.batches import Batch, as_batches
from secateur.core.errors import MaskError, NonFiniteError, SecateurError
from secateur.core.names import unwrap
from secateur.printing import printed
from secateur.progress import track
from secateur.reconstruct.consumers import Consumer, consumers_of
from secateur.reconstruct.measure import Tokens, device_of, measure, measure_both
from secateur.reconstruct.moments import CrossMoments, Halves, Moments
from secateur.reconstruct.order import Order, Stage, order_of
from secateur.reconstruct.passes import Passes, chain_of
from secateur.reconstruct.solve import Reconstructed, reconstruct
from secateur.reconstruct.twin import Slices, check_slices, masked_twin, zero_slices_

_PARALLEL, _SEQUENTIAL = "parallel", "sequential"


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer. Errors are relative: see `Reconstructed`.

    Attributes:
        name: of the weight.
        features: input features it had.
        kept: those that stay.
        tokens: rows of data that it was fitted to.
        error_before: squared error of its output over that of the dense layer, after plain removal.
        error_bias: with a new bias alone.
        error_after: as repaired.
        damping: relative to the mean of the diagonal; None if the weights are as before.
        held_out: on one half of the data, of what the other half gives; None if there was one row.
        notes: what a reader must know.
    """

    name: str
    features: int
    kept: int
    tokens: int
    error_before: float
    error_bias: float
    error_after: float
    damping: float | None
    held_out: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RepairReport:
    """What `repair_` did: layers in the order of execution, and those left as they were, with the reason."""

    mode: str
    layers: tuple[LayerRepair, ...]
    skipped: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        skipped = [{"name": name, "reason": reason} for name, reason in self.skipped]
        return {"mode": self.mode, "layers": [asdict(x) for x in self.layers], "skipped": skipped}

    def __rich__(self) -> RenderableType:
        caption = "Squared error of a layer's output over that of the dense layer"
        table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("kept", "of", "removed", "bias", "repaired", "held out"):
            table.add_column(heading, justify="right")
        for x in self.layers:
            figures = (x.error_before, x.error_bias, x.error_after, x.held_out)
            errors = ("" if e is None else f"{e:.3g}" for e in figures)
            table.add_row(escape(x.name), str(x.kept), str(x.features), *errors)
        return table

    def __str__(self) -> str:
        return printed(self)


def repair_(
    model: nn.Module,
    keeps: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    slices: Slices | None = None,
    mode: str = _SEQUENTIAL,
    damping: float = 1e-4,
    tokens: Tokens | None = None,
    memory: int = 4 << 30,
) -> RepairReport:
    """Fit the weights that stay, in place, so that each layer's output is near what it was with all inputs.

    The model is the dense one and keeps its shapes: columns of removed inputs become zero, other tensors are
    not touched, and cutting them out is left to the caller. Run `reestimate_batchnorm_` after that.

    *Sequential* fits one stage after the other, a stage being the layers that take in the same tensor, to the
    inputs that the layers repaired before it pass on; for each stage one pass over the data, of the dense
    model and of its masked twin, from the block where the stage stands to its inputs where a model can be
    entered there. A layer that is called several times in a pass is fitted once, to the inputs of all its
    calls at that point. *Parallel* fits all layers to inputs of the dense model, in one pass for as many
    layers as `memory` allows. Before either comes one pass that finds the order.

    The twin is zero where the smaller model has nothing. For axes where that is not the same (a `LayerNorm`
    over them, say), sequential inputs are only near to those of the smaller model.

    Args:
        model: the dense model.
        keeps: name of a layer's weight -> True for input features (channels of a convolution) that stay.
        batches: calibration data in the forms that `collect` takes; targets are ignored.
        slices: everything else that goes, rows above all: `(name, dimension)` -> what stays. The twin is
            masked with it, and errors are taken over the outputs that stay.
        mode: "sequential" or "parallel".
        damping: the least that is tried; see `reconstruct`. More is used where the half of the data that a
            layer was not fitted to says so.
        tokens: of a convolution's positions take a sample; see `Tokens`.
        memory: bytes of moments held at once in parallel mode, but at least one layer's.

    Memory: the repaired weights, until all are written; in sequential mode a copy of the model, the
    moments of one stage, six times 8 bytes times the square of its inputs, the batches, and for each
    of the two models the hidden states between two blocks on all batches; in parallel mode `memory`.

    Returns:
        Errors of each layer, and the layers left with plain removal: what `consumers_of` leaves out, and what
        the data never reaches.

    Raises:
        SelectionError: a name that the model does not have.
        MaskError: a mask that does not fit.
        StatsError: no batches.
        NonFiniteError: NaN or infinity in a layer's weight or inputs. The model is unchanged after an error.
    """
    if mode not in (_SEQUENTIAL, _PARALLEL):
        raise SecateurError(f'mode=... is "sequential" or "parallel"; got {mode!r}.')
    model = unwrap(model)
    consumers, reasons = consumers_of(model, keeps)
    everything = _merged(consumers, keeps, slices or {})
    check_slices(model, everything)
    data: Iterable[Batch] = as_batches(batches, device_of(model), "Repair fits weights to data")
    if mode == _SEQUENTIAL:
        data = list(data)  # what is kept of a batch goes with this batch, and a loader may shuffle
    order = order_of(model, consumers, data)
    reached = {c.name for stage in order.stages for c in stage}
    reasons |= {c.name: "no batch reached it" for c in consumers if c.name not in reached}
    fit = _Fitting(model, keeps, everything, damping)
    if mode == _SEQUENTIAL:
        done = _sequential(fit, order, data, tokens or Tokens())
    else:
        done = _parallel(fit, order, data, tokens or Tokens(), memory)
    layers = []
    for consumer, solved, count in done:
        _write(model, consumer, solved)
        layers.append(_record(consumer, keeps[consumer.name], solved, count))
    return RepairReport(mode, tuple(layers), tuple((n, reasons[n]) for n in keeps if n in reasons))


_Done = tuple[Consumer, Reconstructed, int]


@dataclass(frozen=True)
class _Fitting:
    """What fitting a layer needs besides its moments."""

    model: nn.Module
    keeps: Mapping[str, Tensor]
    slices: Slices
    damping: float

    def __call__(
        self, c: Consumer, halves: Halves[Moments] | Halves[CrossMoments], notes: tuple[str, ...] = ()
    ) -> _Done:
        bias = None if c.bias is None else self.model.get_parameter(c.bias).detach()
        weight = self.model.get_parameter(c.name).detach()
        rows, keep, found = self.slices.get((c.name, 1 - c.input_dim)), self.keeps[c.name], halves.whole
        try:
            solved = reconstruct(weight, bias, keep, found, c.layout, self.damping, rows, halves.parts)
        except NonFiniteError as error:
            raise NonFiniteError(f"{c.name}: {error}") from None
        count = found.count if isinstance(found, Moments) else found.dense.count
        return c, replace(solved, notes=(*notes, *solved.notes)), count


def _sequential(fit: _Fitting, order: Order, data: Iterable[Batch], tokens: Tokens) -> list[_Done]:
    """All layers, each fitted to the inputs that the repaired ones before it pass on."""
    twin = masked_twin(fit.model, fit.slices)
    first = next(iter(data))
    chain = chain_of(fit.model, [c for stage in order.stages for c in stage], first)
    dense_passes, twin_passes = Passes(fit.model, chain), Passes(twin, chain)
    run = (
        lambda i, batch: dense_passes.run(i, batch, order.calls[i]),
        lambda i, batch: twin_passes.run(i, batch, order.calls[i]),
    )
    done = []
    for stage in track(order.stages, "repairing"):
        twin_passes.enter(stage)
        if dense_passes.enter(stage) and not dense_passes.agree(first, order.calls[0]):
            dense_passes.whole()
            twin_passes.whole()
        both = measure_both(fit.model, twin, [stage], data, tokens, order.several, run)
        alone = tuple(c for c in stage if c.name not in both)
        dense = measure(fit.model, [alone], data, tokens, order.several) if alone else {}
        why = ("Fitted to inputs of the dense model: in the pruned one it gets other tokens.",)
        for c in stage:
            fitted = fit(c, both[c.name]) if c.name in both else fit(c, dense[c.name], why)
            done.append(fitted)
            _write(twin, c, fitted[1])
            zero_slices_(twin, fit.slices, (c.name, c.bias or c.name))
    return done


def _parallel(fit: _Fitting, order: Order, data: Iterable[Batch], tokens: Tokens, memory: int) -> list[_Done]:
    """All layers, each fitted to inputs of the dense model."""
    done: list[_Done] = []
    for share in track(list(_shares(order.stages, memory)), "repairing"):
        found = measure(fit.model, share, data, tokens, order.several)
        done.extend(fit(c, found[c.name]) for stage in share for c in stage if c.name in found)
    return done


def _shares(stages: Sequence[Stage], memory: int) -> Iterator[list[Stage]]:
    """Consecutive stages whose moments fit into `memory` bytes together."""
    share: list[Stage] = []
    held = 0
    for stage in stages:
        size = sum(16 * inputs**2 for inputs, *_ in {c.geometry for c in stage})
        if share and held + size > memory:
            yield share
            share, held = [], 0
        share.append(stage)
        held += size
    if share:
        yield share


def _merged(consumers: Iterable[Consumer], keeps: Mapping[str, Tensor], slices: Slices) -> Slices:
    """All that goes: `slices`, and what `keeps` says of the layers that are repaired."""
    merged = dict(slices)
    for c in consumers:
        keep = keeps[c.name]
        if keep.dtype != torch.bool or tuple(keep.shape) != (c.features,):
            raise MaskError(
                f"{c.name} takes in {c.features} features and needs a boolean mask with one entry for each; "
                f"got {keep.dtype} of shape {tuple(keep.shape)}."
            )
        if not torch.equal(merged.setdefault((c.name, c.input_dim), keep).cpu(), keep.cpu()):
            raise MaskError(f"keeps=... and slices=... differ in what stays of the inputs of {c.name}.")
    return merged


@torch.no_grad()
def _write(model: nn.Module, consumer: Consumer, solved: Reconstructed) -> None:
    model.get_parameter(consumer.name).copy_(solved.weight)
    if consumer.bias is not None and solved.bias is not None:
        model.get_parameter(consumer.bias).copy_(solved.bias)


def _record(consumer: Consumer, keep: Tensor, solved: Reconstructed, count: int) -> LayerRepair:
    errors = (solved.error_before, solved.error_bias, solved.error_after)
    kept = int(keep.count_nonzero())
    damping = None if math.isinf(solved.damping) else solved.damping
    settings = damping, solved.held_out, solved.notes
    return LayerRepair(consumer.name, consumer.features, kept, count, *errors, *settings)
