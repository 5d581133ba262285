"""Quantisation of a whole model that is pruned already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import Layer
from secateur.core.names import Target, Where, select
from secateur.int8.grid import Grid, precision, scales_of
from secateur.int8.solve import AsPruned, Quantized
from secateur.masks import Masks
from secateur.prune import prune_

_REMARK = "Points of a grid in tensors of the old type: files and kernels do not get smaller by themselves."


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_` did.

    Attributes:
        bits: of a weight with its sign.
        group: inputs that share a scale; None for whole rows.
        scales: of each weight, `[out, groups]` of its matrix, float32; see `scales_of`.
        errors: squared error of each layer's output over its power, on the batches; without batches, squared
            error of its weights over theirs.
        notes: what a reader must know.
    """

    bits: int
    group: int | None
    scales: Mapping[str, Tensor] = field(repr=False, compare=False)
    errors: Mapping[str, float]
    notes: tuple[str, ...]


def quantize_(
    model: nn.Module,
    masks: Masks | None = None,
    *,
    bits: int = 8,
    group: int | None = None,
    where: Where | None = None,
    batches: Iterable[Any] | None = None,
    damping: float = 0.01,
) -> QuantizeReport:
    """Round the weights of a pruned model to a symmetric grid, in place; weights that are zero stay zero.

    They stay in tensors of the model's own type, as whole multiples of their scales, exactly. To prune and
    quantise in one pass, call `prune_` with `Quantized(solver)`.

    Args:
        model: any module.
        masks: of the model, which have to hold before; then they hold afterwards.
        bits: of a weight with its sign, from 2 to 8.
        group: inputs that share a scale; a whole row if None.
        where: which layers; see `Where`. Embeddings and the output head are left alone unless asked.
        batches: calibration data. With it, layers are rounded in the order in which the model runs them, and
            the weights of a row make up for each other; see `quantized`. Without, each weight goes to the
            nearest point.
        damping: of the Gram matrix, with batches.

    Raises:
        MaskError: the masks do not hold. NonFiniteError: NaN or infinite weights.
        SecateurError: bits or a group that cannot be, and what `prune_` raises for a solver.
            On all errors the model is bit-identical to before.
    """
    grid = Grid(bits, group)
    if masks is not None:
        masks.check(model)
    targets = select(model, where).targets
    for t in targets:
        grid.check(t.matrix, t.name)
    notes: tuple[str, ...] = ()
    if batches is None:
        errors = {t.name: _round_(t, grid) for t in targets}
    else:
        solver = Quantized(AsPruned(damping), bits, group)
        report = prune_(model, solver, allocation=_zeros, where=where, batches=batches)
        errors = {layer.name: layer.error or 0.0 for layer in report.layers}
        notes = report.notes
    scales = {t.name: scales_of(t.matrix, bits, group) for t in targets}
    return QuantizeReport(bits, group, scales, errors, (*notes, _REMARK))


@torch.no_grad()
def _round_(target: Target, grid: Grid) -> float:
    """Each weight to the nearest point, in place; the share of the weights' power that this changes."""
    W_OGI = grid.grouped(target.matrix.float())
    scale = grid.scale(W_OGI.abs().amax(-1, keepdim=True), precision(target.matrix))
    Q_OGI = grid.nearest(W_OGI, scale)
    lost, whole = (float(x.square().sum(dtype=torch.float64)) for x in (Q_OGI - W_OGI, W_OGI))
    target.weight.copy_(target.layout.restore(Q_OGI.flatten(1), target.weight.shape))
    return lost / whole if whole else 0.0


def _zeros(layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
    """An allocation: from each layer what is zero already."""
    return {x.name: int((x.weight() == 0).count_nonzero()) / x.shape.numel() for x in layers}
