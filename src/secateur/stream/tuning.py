"""Block reconstruction: kept weights tuned so that a pruned block hands on what the dense model does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.core.errors import SecateurError
from secateur.core.names import Target
from secateur.reconstruct.order import measuring
from secateur.stream import ranks
from secateur.stream.solving import Job
from secateur.stream.walk import Walk

_HELD_OUT = 8  # one batch in so many tells when to stop


@dataclass(frozen=True)
class Reconstruct:
    r"""A few epochs of Adam on the kept weights of each block once its layers are pruned, masks held.

    $$ \min_{W \odot M} \sum_t \lVert f_W(z)_t - f_{W_0}(x)_t \rVert^2 / \lVert f_{W_0}(x)_t \rVert^2 $$

    over tokens $t$, with $x$ what the dense model passes on to the block and $z$ what the pruned one does, so
    that a block makes up for what was lost before it. One batch in eight is held out: the epoch that is best
    on these is kept, or the weights as the solver left them.

    Args:
        epochs: passes over the batches.
        rate: of Adam, relative to the root mean square of a layer's kept weights times the root of the
            block's distance at the start, since what is nearly right needs small steps; falls to 0 by a
            cosine.
        seed: of the order of batches.

    Reference: Makni et al. 2025, 3BASiL, "transformer matching" (there towards the block's output on its own
    inputs); A free lunch in LLM compression, 2025, compares what to reconstruct.
    """

    epochs: int = 4
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.rate > 0:
            raise SecateurError(f"{self}: epochs are at least 1 and the rate is above 0.")


def error_notes(correction: float | None, reconstruct: Reconstruct | None) -> tuple[str, ...]:
    """What the errors of layers in a report are not, once targets are shifted or weights tuned."""
    notes = []
    if correction is not None:
        notes.append("Errors of layers are against their corrected targets, not the dense layer's outputs.")
    if reconstruct is not None:
        notes.append("Errors of layers are those before their block was tuned.")
    return tuple(notes)


def gain_notes(gains: Sequence[float]) -> tuple[str, ...]:
    """What tuning did, from what `reconstruct_` returned for each block."""
    if not gains:
        return ()
    text = (
        f"Tuning brought {len(gains)} blocks to {statistics.fmean(gains):.2f} of their squared distance from "
        f"the dense model, on batches held out; {min(gains):.2f} at best, {max(gains):.2f} at worst."
    )
    if left := sum(gain == 1 for gain in gains):
        text += f" {left} of them stay as the solver left them: nothing was better."
    return (text,)


def reconstruct_(
    walk: Walk, dense: Walk, masks: Mapping[Target, Tensor], settings: Reconstruct, job: Job
) -> float:
    """Tune the block behind those that are done, in place.

    Args:
        walk: of the pruned model.
        dense: that of the dense one, a block further.
        masks: of the targets in the block, `[out, in]`.
        settings: of the optimizer.
        job: says in which types the weights will be stored.

    Returns the loss on held-out batches after over before; 1 if nothing was better.
    """
    keep = {t: t.layout.restore(m, t.weight.shape) for t, m in masks.items()}
    batches = range(len(walk.data))
    held_out = [i for i in batches if (i * ranks.count() + ranks.rank()) % _HELD_OUT == _HELD_OUT - 1]
    training = [i for i in batches if i not in held_out]
    judged = held_out if ranks.any_(bool(held_out)) else training
    most = max(ranks.gather(len(training)))  # steps of an epoch: each process takes a batch of its own
    weights = [t.weight for t in masks]
    generator = torch.Generator().manual_seed(settings.seed)
    with measuring(walk.model), _training(walk.model, [t.weight for t in masks]):
        first = best = _loss(walk, dense, judged)
        rate = settings.rate * math.sqrt(first)
        groups = [{"params": [t.weight], "lr": rate * _size(t.weight, keep[t])} for t in masks]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / (settings.epochs * most))
        )
        kept = [t.weight.detach().clone() for t in masks]
        for _ in range(settings.epochs):
            order = torch.randperm(len(training), generator=generator).tolist()
            for k in range(most):
                if k < len(order):
                    with torch.enable_grad():
                        _distance(walk, dense, training[order[k]]).backward()
                _average_(weights, k < len(order))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for t in masks:
                    t.weight.mul_(keep[t])
            if (now := _loss(walk, dense, judged)) < best:
                best, kept = now, [t.weight.detach().clone() for t in masks]
        for t, weight in zip(masks, kept, strict=True):
            t.weight.copy_(job.rounded(t.name, weight))
    return best / max(first, torch.finfo(torch.float64).tiny)


def _size(weight: Tensor, keep: Tensor) -> float:
    return float(weight.detach().float().square().sum().div(max(1, int(keep.sum()))).sqrt())


def _loss(walk: Walk, dense: Walk, batches: Sequence[int]) -> float:
    """Mean over the batches of all processes."""
    total = math.fsum(float(_distance(walk, dense, i)) for i in batches)
    found = torch.tensor([total, len(batches)], dtype=torch.float64)
    ranks.add_(found)
    return float(found[0] / found[1])


def _average_(weights: Sequence[Tensor], mine: bool) -> None:
    """Gradients averaged over the processes that had a batch, the same bits in each."""
    if not ranks.several():
        return
    several = ranks.total(int(mine))
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        ranks.add_(weight.grad)
        weight.grad /= several


def _distance(walk: Walk, dense: Walk, i: int) -> Tensor:
    """Of what the block returns from what it should."""
    return apart(_hidden(walk.run(i, walk.done + 1)), _hidden(dense.states.get(walk.done, i)))


def apart(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens `[..., tokens, width]` of the squared difference over the squared norm wanted.

    A token below the median counts as if of the median, so that empty ones do not rule. Without a scale for
    each, a few would: the first token of a language model often holds nearly all of the power.
    """
    got, wanted = got.float(), wanted.float()
    along = -1 if wanted.ndim <= 3 else tuple(range(1, wanted.ndim))  # images have no tokens
    power = wanted.square().mean(along)
    usual = power[power > 0].median() if bool(power.any()) else power.new_ones(())
    return ((got - wanted).square().mean(along) / power.clamp(min=usual)).mean()


def _hidden(tree: object) -> Tensor:
    return next(x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point())


@contextmanager
def _training(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """While this holds, these and no other parameters have gradients."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in wanted:
        p.requires_grad_(False)
    for w in weights:
        w.requires_grad_(True)
    try:
        yield
    finally:
        for p, before in wanted:
            p.requires_grad_(before)
            if not before:
                p.grad = None
