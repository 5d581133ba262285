r"""How much each block matters, from data. Larger means keep.

Shapes: B examples, T tokens or positions, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.collect.batches import Batch, Batches, Loss, as_batches, mean_loss
from secateur.core.errors import NonFiniteError, SelectionError, StatsError
from secateur.core.names import unwrap
from secateur.layers.finding import Stack, require, survey
from secateur.layers.tensors import bypassed, call, inference, main_input, main_output
from secateur.progress import track


def block_influence(
    model: nn.Module, batches: Iterable[Any], stacks: Sequence[Stack] | None = None
) -> dict[str, float]:
    r"""How far each block turns the hidden state.

    $$ 1 - \mathbb{E}\left[ \frac{h_{in}^\top h_{out}}{\lVert h_{in} \rVert \lVert h_{out} \rVert} \right] $$

    The mean is over all tokens of all batches, except those that `attention_mask` (in the decoder of a pair,
    `decoder_attention_mask`) marks as padding. In a picture every position is a token, and its vector are
    the channels: dimension 1 for blocks with a convolution over that many channels, else the last. Two zero
    vectors count as equal, a zero and another as orthogonal. One pass over the data, in evaluation mode.

    Args:
        model: any module.
        batches: as `collect` takes them; targets are ignored.
        stacks: which ones; None: all that `stacks` finds with the first batch.

    Returns:
        {name of block: influence in [0, 2]}, of the blocks that can be dropped.

    Raises:
        StatsError: no batches, or only padding.
        NonFiniteError: NaN or infinite hidden states.

    Source: Men et al. 2024, ShortGPT, equation 1. Differs from the paper: padding does not count.
    """
    inner, data, found = _setting(model, batches, stacks, "Block influence is measured on data")
    sums = {name: _Mean() for stack in found for name in stack.droppable}

    def see(name: str, batch: Batch, before: Tensor, after: Tensor) -> None:
        block = inner.get_submodule(name)
        real = _real_tokens(inner, name, batch, before)
        sums[name].add(1 - _cosine(_tokens(block, before), _tokens(block, after)), real)

    with inference(inner):
        for batch in track(data, "measuring blocks"):
            with _listening(inner, sums, lambda name, *pair, batch=batch: see(name, batch, *pair)):
                batch.forward(inner)
    return {name: mean.value(name) for name, mean in sums.items()}


def loss_increase(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    stacks: Sequence[Stack] | None = None,
) -> dict[str, float]:
    """How much the loss grows if each block alone is bypassed; negative for a block that does harm.

    The loss is the mean over batches, weighted by their numbers of examples. One pass over the data for each
    block, and one more, in evaluation mode. It tells nothing of blocks that stand in for each other: after
    some are dropped, measure again.

    Args:
        model: any module.
        batches: as `collect` takes them, with targets.
        loss: `loss(output, target)` -> mean over the batch. None: the model returns its loss.
        stacks: which ones; None: all that `stacks` finds with the first batch.

    Raises:
        StatsError: no batches, or a missing loss.
        NonFiniteError: a loss that is NaN or infinite.
    """
    inner, data, found = _setting(model, batches, stacks, "The increase of the loss is measured on data")
    sums = {name: _Mean() for stack in found for name in stack.droppable}
    with inference(inner):
        for batch in track(data, "measuring blocks"):
            dense = mean_loss(call(inner, batch.args, batch.kwargs), batch, loss).double()
            for name, mean in sums.items():
                with bypassed(inner, [name]):
                    value = mean_loss(call(inner, batch.args, batch.kwargs), batch, loss).double()
                mean.add((value - dense).expand(batch.size), None)
    return {name: mean.value(name) for name, mean in sums.items()}


def angular_distance(
    model: nn.Module,
    batches: Iterable[Any],
    n: int,
    stacks: Sequence[Stack] | None = None,
    *,
    tokens: Literal["last", "all"] = "last",
) -> dict[tuple[str, ...], float]:
    r"""How far each run of `n` consecutive blocks turns the hidden state: an angle, 1 being half a turn.

    $$ \frac{1}{\pi} \, \mathbb{E}\left[ \arccos
       \frac{h_\ell^\top h_{\ell+n}}{\lVert h_\ell \rVert \lVert h_{\ell+n} \rVert} \right] $$

    `min(runs, key=runs.get)` are the blocks to drop. Tokens, padding and zero vectors are as in
    `block_influence`.

    Args:
        model: any module.
        batches: as `collect` takes them; targets are ignored.
        n: blocks in a run, all of which can be dropped.
        stacks: which ones; None: all that `stacks` finds with the first batch.
        tokens: "last" takes the last token of each sequence, as the paper does; it has seen all others if the
            model is causal. "all" is for other models.

    Returns:
        {names of the blocks of a run: distance in [0, 1]}.

    Raises:
        SelectionError: no stack has `n` such blocks in a row.
        StatsError: no batches, only padding, or no last token because hidden states are not [B, T, C].
        NonFiniteError: NaN or infinite hidden states.

    Source: Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers, equation 4.
    """
    inner, data, found = _setting(model, batches, stacks, "Angular distance is measured on data")
    runs = [names for stack in found for names in _runs(stack, n)]
    if not runs:
        raise SelectionError(f"No stack has {n} blocks in a row that can be dropped, n is 1 at least.")
    sums = {names: _Mean() for names in runs}
    ends = list(dict.fromkeys(name for names in runs for name in (names[0], names[-1])))
    with inference(inner):
        for batch in track(data, "measuring blocks"):
            seen: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}

            def see(name: str, before: Tensor, after: Tensor, batch: Batch = batch, seen: Any = seen) -> None:
                block, real = inner.get_submodule(name), _real_tokens(inner, name, batch, before)
                states = (_tokens(block, before), _tokens(block, after), real)
                seen[name] = _last(before, *states) if tokens == "last" else states

            with _listening(inner, ends, see):
                batch.forward(inner)
            for names, mean in sums.items():
                (first, _, real), (_, last, _) = seen[names[0]], seen[names[-1]]
                mean.add(_cosine(first, last).clamp(-1, 1).arccos() / math.pi, real)
    return {names: mean.value(names[0]) for names, mean in sums.items()}


class _Mean:
    """A running mean over values, those left out that are not real."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor, real: Tensor | None) -> None:
        values = values.flatten() if real is None else values[real]
        self.total += float(values.sum())
        self.count += values.numel()

    def value(self, name: str) -> float:
        if not self.count:
            raise StatsError(f"No token reached {name} that is not padding.")
        if not math.isfinite(self.total):
            raise NonFiniteError(f"What was measured of {name} is not finite: look for NaN or overflow.")
        return self.total / self.count


def _setting(
    model: nn.Module, batches: Iterable[Any], stacks: Sequence[Stack] | None, why: str
) -> tuple[nn.Module, Batches, Sequence[Stack]]:
    inner = unwrap(model)
    device = next((p.device for p in inner.parameters()), torch.device("cpu"))
    data = as_batches(batches, device, why)
    if stacks is None:
        first = next(iter(data))
        stacks = survey(inner, first.args, first.kwargs)
    return inner, data, require(inner, stacks)


def _runs(stack: Stack, n: int) -> Iterator[tuple[str, ...]]:
    """Names of every `n` consecutive blocks that can be dropped."""
    for start in range(len(stack) - n + 1 if n > 0 else 0):
        blocks = stack.blocks[start : start + n]
        if all(block.reason is None for block in blocks):
            yield tuple(block.name for block in blocks)


@contextmanager
def _listening(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """While this holds, `see(name, before, after)` is called with the hidden states around each block."""
    handles = []

    def listen(name: str) -> None:
        waiting: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = main_input(args, kwargs)
            assert x is not None
            waiting.append(x.clone())  # the block may change it in place

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            y = main_output(output)
            assert y is not None
            see(name, waiting.pop(), y)

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    try:
        for name in names:
            listen(name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(block: nn.Module, h: Tensor) -> Float[Tensor, "... C"]:
    """A hidden state with its channels last, in float64."""
    convolutions = (m for m in block.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    channels = {m.in_channels for m in convolutions} if h.dim() > 2 else set()
    first = h.dim() > 2 and h.shape[1] in channels and not (h.dim() == 3 and h.shape[2] in channels)
    return (h.movedim(1, -1) if first else h).double()


def _cosine(a: Float[Tensor, "... C"], b: Float[Tensor, "... C"]) -> Float[Tensor, "..."]:
    a_norm, b_norm = a.norm(dim=-1), b.norm(dim=-1)
    cosine = (F.normalize(a, dim=-1, eps=0.0) * F.normalize(b, dim=-1, eps=0.0)).sum(dim=-1)
    zero = (a_norm == 0) | (b_norm == 0)
    return torch.where(zero, ((a_norm == 0) & (b_norm == 0)).double(), cosine)


def _real_tokens(model: Any, name: str, batch: Batch, h: Tensor) -> Bool[Tensor, "B T"] | None:
    """Which tokens of a hidden state [B, T, C] are not padding; None: all."""
    key = "attention_mask"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", nn.Module)()
        if any(module is model.get_submodule(name) for module in decoder.modules()):
            key = "decoder_attention_mask"
    mask = batch.kwargs.get(key)
    if isinstance(mask, Tensor) and h.dim() == 3 and mask.shape == h.shape[:2]:
        return mask.bool()
    return None


def _last(
    h: Tensor, before: Tensor, after: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor, Bool[Tensor, " B"]]:
    """The last token of each sequence, [B, C], and whether a sequence has one."""
    if h.dim() != 3:
        raise StatsError(f"A hidden state of shape {[*h.shape]} has no last token: pass tokens='all'.")
    real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if real is None else real
    steps = torch.arange(1, h.shape[1] + 1, device=h.device)
    at, rows = (real * steps).argmax(dim=1), torch.arange(len(h), device=h.device)
    return before[rows, at], after[rows, at], real.any(dim=1)
