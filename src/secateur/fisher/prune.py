"""Pruning by the inverse Fisher matrix: the weights that cost least go, those that stay make up for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.allocation import Allocation, Layer, global_
from secateur.collect import Loss
from secateur.collect.batches import as_batches
from secateur.core.errors import NonFiniteError, SecateurError, SparsityError
from secateur.core.names import Target, Where, select, unwrap
from secateur.fisher.estimate import Estimate, flat, unflat, unit_of
from secateur.fisher.inverse import InverseFisher
from secateur.masks import Masks
from secateur.measure import measure, zeros
from secateur.patterns import Pattern, Unstructured, on_the_way
from secateur.prune import check_targets, masks_of, records_of, refuse_class, remarks, undone_on_error
from secateur.record import Report


def prune_fisher_(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any],
    loss: Loss | None = None,
    block: int = 50,
    damping: float = 1e-4,
    gradients: int | None = None,
    recompute: int = 4,
    update: bool = True,
    pattern: Pattern | None = None,
    allocation: Allocation = global_,
    where: Where | None = None,
) -> Report:
    r"""Remove the weights that cost least by the empirical Fisher matrix, in place, and adapt the others.

    $$ F = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^T, \qquad \rho_q = \frac{w_q^2}{2 [F^{-1}]_{qq}}, \qquad
       \delta w = -[F^{-1}]_{:,Q} \left([F^{-1}]_{QQ}\right)^{-1} w_Q $$

    $F$ is cut to blocks along its diagonal. A weight scores the loss $\rho_q$ that its removal adds when the
    others of its block adapt; a block of the pattern `Block` the same for all its weights together. What is
    removed of a block, $Q$, is made up for jointly, not weight by weight. Weights that are zero already go
    first, and stay zero. Counts are exact. On any error the model is bit-identical to before.

    Each $g_i$ is the gradient of the loss of one batch as given. Batches of one example make $F$ the
    empirical Fisher matrix; gradients averaged over n examples make it smaller by up to n, beside a damping
    that stays.

    The model runs in evaluation mode; `.grad`, modes and torch's random state are left as they were. Memory:
    `block + 32` values of float32 for each selected weight. Time: `gradients` passes forward and back, and
    `block * gradients` multiplications for each weight.

    Args:
        model: any module. Wrappers of `torch.compile` and data parallelism are looked through.
        sparsity: fraction to remove, in [0, 1].
        batches: data; see `collect`.
        loss: `loss(output, target)`, mean over the batch; None if the model returns its loss.
        block: entries of a layer's matrix, in a row, whose weights are taken to interact. With `Block`, its
            blocks lie one after the other, and a multiple of their size is taken.
        damping: $\lambda$, in the units of a squared gradient. With too little, weights move far where the
            gradients say nothing. oBERT takes 1e-7 for BERT; small networks, with batches of one example,
            did best with 1e-4 to 1e-3. Where float32 cannot resolve it beside the gradients, it is raised
            tenfold until it can, with a note.
        gradients: m, read from the first so many batches; None: all.
        recompute: steps to the target, the density falling geometrically; each measures $F$ anew on what the
            one before it left. High sparsities need several: one step trusts the matrix too far.
        update: adapt the weights that stay.
        pattern: which entries may survive; `Unstructured()` if None. `NM` chooses by the scores of single
            weights.
        allocation: how much from each layer. The scores of all layers are in units of the loss.
        where: which layers; see `Where`.

    Returns:
        The report; `report.masks` holds the masks.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Singh and Alistarh 2020, WoodFisher; Kurtic et al. 2022, The optimal BERT surgeon. Differs from
    WoodFisher: the update is joint, as in oBERT.
    """
    started = time.perf_counter()
    refuse_class(pattern)
    refuse_class(allocation)
    _refuse(sparsity, block, damping, gradients, recompute)
    pattern, model = pattern or Unstructured(), unwrap(model)
    selection = select(model, where)
    check_targets(selection.targets, pattern)
    data = as_batches(batches, selection.targets[0].weight.device, "The Fisher matrix is measured on data")
    estimate = Estimate(model, selection.targets, data, loss, block, damping, gradients, pattern)
    before = measure(model)
    with undone_on_error(selection.targets):
        for i, asked in enumerate(_steps(selection.targets, sparsity, recompute), 1):
            what = f"measuring gradients, step {i} of {recompute}"
            on_way = on_the_way(pattern, last=i == recompute)
            keep, shares = _step_(estimate, what, on_way, allocation, asked, update)
    masks = Masks({t.name: t.layout.restore(keep[t.name], t.weight.shape) for t in selection.targets})
    records = records_of(selection, masks, shares, {})
    settings = {
        "criterion": f"inverse Fisher(block={block}, damping={damping}, gradients={estimate.gradients})",
        "sparsity": repr(sparsity),
        "pattern": repr(pattern),
        "allocation": getattr(allocation, "__name__", repr(allocation)),
        "recompute": repr(recompute),
        "update": repr(update),
        **({} if where is None else {"where": repr(where)}),
    }
    pruned = time.perf_counter()
    after = measure(model)
    seconds = {"pruning": pruned - started, "measuring": time.perf_counter() - pruned}
    notes = (*estimate.notes(), *remarks(records))
    return Report(settings, records, selection.skipped, before, after, notes, seconds, masks)


def _refuse(sparsity: float, block: int, damping: float, gradients: int | None, recompute: int) -> None:
    if not 0 <= sparsity <= 1:
        raise SparsityError(f"Sparsity is the fraction removed, between 0 and 1; got {sparsity}.")
    if not 0 < damping < math.inf:
        raise SecateurError(f"damping is above 0, else F may have no inverse; got {damping}.")
    for name, value in (("block", block), ("gradients", gradients), ("recompute", recompute)):
        if value is not None and value < 1:
            raise SecateurError(f"prune_fisher_({name}=...) is at least 1; got {value}.")


def _steps(targets: Sequence[Target], sparsity: float, recompute: int) -> list[float]:
    """Sparsities of all steps: the density falls by the same factor each time, from what it is now."""
    now = 1 - sum(zeros(t.weight) for t in targets) / sum(t.weight.numel() for t in targets)
    parts = [i / recompute for i in range(1, recompute)]
    # The last is the asked sparsity itself, without rounding noise.
    return [*(1 - now ** (1 - part) * (1 - sparsity) ** part for part in parts), sparsity]


def _step_(
    estimate: Estimate, what: str, pattern: Pattern, allocation: Allocation, sparsity: float, update: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Measure, choose and write. Returns masks in matrix layout, and the sparsity of each layer."""
    inverses = estimate(what)
    layers = [_layer(t, inverses[t.name], pattern) for t in estimate.targets]
    keep, shares = masks_of(layers, pattern, allocation, sparsity)
    for t in estimate.targets:
        _write_(t, inverses[t.name], keep[t.name], pattern, update)
    return keep, shares


def _layer(target: Target, inverse: InverseFisher, pattern: Pattern) -> Layer:
    """A layer whose scores are measured once: a ranking asks for them several times."""
    scores = _scores(target, inverse, pattern)
    kernel = target.weight.shape
    return Layer(target.name, target.shape, kernel, pattern, lambda: target.matrix.float(), lambda: scores)


def _scores(target: Target, inverse: InverseFisher, pattern: Pattern) -> Float[Tensor, "out in"]:
    """One value an entry, such that a unit's entries that are not gone yet add up to the unit's score."""
    unit = unit_of(pattern)
    weight_GU = flat(pattern, target.matrix).view(-1, unit)
    alive_GU = weight_GU != 0
    score_G1 = inverse.scores(weight_GU.view(-1), unit)[:, None]
    if not bool(score_G1.isfinite().all()):
        raise NonFiniteError(
            f"{target.name} has NaN or infinite scores: its gradients overflow. Use a loss of lower scale."
        )
    each_GU = (score_G1 / alive_GU.sum(1, keepdim=True).clamp(min=1)).expand_as(weight_GU)
    return unflat(pattern, each_GU.masked_fill(~alive_GU, -torch.inf).view(-1), target.shape)


@torch.no_grad()
def _write_(target: Target, inverse: InverseFisher, keep: Tensor, pattern: Pattern, update: bool) -> None:
    """Set the weights that are not kept to zero, and adapt the others."""
    weight = target.matrix.masked_fill(~keep, 0)
    if update:
        entries = inverse.removed(flat(pattern, target.matrix), flat(pattern, keep))
        weight = unflat(pattern, entries, target.shape)
    if not bool(weight.isfinite().all()):
        raise NonFiniteError(
            f"The adapted weights of {target.name} do not fit into {weight.dtype}: use more damping, or "
            "update=False."
        )
    target.weight.copy_(target.layout.restore(weight, target.weight.shape))
