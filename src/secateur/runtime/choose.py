"""Which format, if any, makes a layer faster on this machine: by measurement."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.runtime import native
from secateur.runtime.formats import Bitmask, Blocks, Indexed, Packed
from secateur.runtime.formats.blocks import ROWS, in_blocks
from secateur.runtime.formats.common import MOST_COLUMNS
from secateur.runtime.linear import NEVER, SparseConv1x1, SparseLinear
from secateur.runtime.plan import Plan

FROM_MEMORY = 64 * 2**20  # bytes of weights in turn, so that they come from memory as in a whole model
SWITCHES = (4, 8, 16, 32, 64, 128, 256)
LEAST_INDEXED = 0.65  # sparsity from which on indices are worth a trial
MOST_FILLED = 1.5  # values that blocks may store for each that is not zero, to be worth a trial


@dataclass(frozen=True)
class Times:
    """Median seconds of a dense and a sparse layer, called in turn."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        """How many times faster the sparse one is."""
        return self.dense / self.sparse


@dataclass(frozen=True)
class Choice:
    """A format, and what it gives: `times` by number of tokens.

    `format` is "bitmask", "indexed" or "blocks"; `plan` says whether the layout for many tokens is kept too,
    `pairs` whether for pairs of columns, `switch` from how many tokens on the kernel for many tokens is used.
    """

    format: str
    dtype: torch.dtype
    plan: bool
    pairs: bool
    switch: int
    times: dict[int, Times]

    def build(self, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] | None) -> SparseLinear:
        """The layer."""
        packed = pack(weight, self.format, self.dtype)
        plan = Plan.of(packed, self.pairs) if self.plan else None
        return layer_of(packed, bias, plan, self.switch, stride)


def paired(input: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a plan for such inputs and values is one of pairs."""
    return input == stored == torch.bfloat16 and native.pairs()


def pack(weight: Tensor, format: str, dtype: torch.dtype) -> Packed:
    """A weight [N, K] in a format by its name."""
    if format == "blocks":
        return Blocks.pack(weight, dtype=dtype)
    return Bitmask.pack(weight, dtype=dtype) if format == "bitmask" else Indexed.pack(weight, dtype=dtype)


def layer_of(
    packed: Packed, bias: Tensor | None, plan: Plan | None, switch: int, stride: tuple[int, int] | None
) -> SparseLinear:
    """A linear layer, or a convolution where there is a stride."""
    if stride is None:
        return SparseLinear(packed, bias, plan, switch)
    return SparseConv1x1(packed, bias, plan, switch, stride)


def choose(
    dense: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int] | None,
    *,
    dtype: torch.dtype,
    tokens: Sequence[int],
    plan: bool,
    tried: Sequence[str],
) -> Choice | None:
    """The fastest format, judged by the worst of `tokens`; None where no kernel can hold the layer.

    Args:
        dense: the layer to replace.
        weight: its matrix [N, K].
        bias: its bias.
        stride: of a convolution, None for a linear layer.
        dtype: of the packed values.
        tokens: how many tokens (positions of an image) come at once.
        plan: whether the layout for many tokens may be kept.
        tried: formats, as `formats` gives them.
    """
    found = []
    pairs = paired(weight.dtype, dtype)
    for format in tried:
        packed = pack(weight, format, dtype)
        made = Plan.of(packed, pairs) if plan and native.library() is not None else None
        switch = _switch(packed, bias, made, stride, dense)
        layer = layer_of(packed, bias, made, switch, stride)
        times = {n: compare(dense, layer, example(dense, weight.shape[1], n, stride)) for n in tokens}
        found.append(Choice(format, dtype, made is not None, pairs, switch, times))
    return max(found, key=lambda c: min(t.speedup for t in c.times.values())) if found else None


def compare(dense: nn.Module, sparse: nn.Module, x: Tensor, seconds: float = 0.15) -> Times:
    """Both called in turn, at least five times each, with weights that come from memory."""
    size = sum(t.numel() * t.element_size() for t in (*dense.parameters(), *dense.buffers()))
    copies = max(1, min(64, FROM_MEMORY // max(1, size)))
    layers = [(dense, sparse), *((copy.deepcopy(dense), copy.deepcopy(sparse)) for _ in range(copies - 1))]
    with torch.inference_mode():
        for a, b in layers:  # pages, caches of pointers, oneDNN's primitives
            a(x), b(x)
        taken: tuple[list[float], list[float]] = ([], [])
        until = time.perf_counter() + seconds
        while len(taken[0]) < 5 or (time.perf_counter() < until and len(taken[0]) < 500):
            for pair in layers:
                for layer, into in zip(pair, taken, strict=True):
                    into.append(_seconds(lambda layer=layer: layer(x)))  # type: ignore[misc]
    return Times(*(statistics.median(t) for t in taken))


def example(dense: nn.Module, columns: int, tokens: int, stride: tuple[int, int] | None) -> Tensor:
    """Random input of so many tokens, in the type of the layer."""
    dtype = next(dense.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    if stride is None:
        return torch.randn(tokens, columns, generator=generator).to(dtype)
    image = torch.randn(1, columns, stride[0], tokens * stride[1], generator=generator)
    return image.to(dtype)


def formats(weight: Tensor, dtype: torch.dtype) -> list[str]:
    """Those that are worth a trial for a weight [N, K] with values of this type."""
    if dtype == torch.int8 or weight.shape[1] > MOST_COLUMNS:
        return ["bitmask"]
    keep = weight != 0
    kept = int(keep.sum())
    found = ["bitmask"]
    if kept <= (1 - LEAST_INDEXED) * weight.numel():
        found.append("indexed")
    if 0 < ROWS * int(in_blocks(keep).any(-1).sum()) <= MOST_FILLED * kept:
        found.append("blocks")
    return found


def _switch(
    packed: Packed, bias: Tensor | None, plan: Plan | None, stride: tuple[int, int] | None, dense: nn.Module
) -> int:
    """Tokens from which on the kernel for many tokens is the faster one."""
    if native.library() is None:
        return NEVER
    few, many = (layer_of(packed, bias, plan, switch, stride) for switch in (NEVER, 0))
    for tokens in SWITCHES:
        x = example(dense, packed.shape[1], tokens, stride)
        if compare(few, many, x, seconds=0.03).speedup > 1:
            return tokens
    return NEVER


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
