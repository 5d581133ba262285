"""One bit for each entry, and the values of those that are kept.

Shape letters: N rows (outputs) and K columns (inputs) of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.runtime.formats.common import TAIL, check_buffer, check_shape, prepared, unsound

ROWS = 4  # rows of a group, whose weights form one stream
WIDTH = 64  # columns are padded to a multiple of it
STEPS = {torch.float32: 16, torch.bfloat16: 32, torch.int8: 64}  # columns of one word of the mask

_BITS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Bitmask:
    """One bit an entry and the kept values, in the order in which the kernels read them.

    Rows come in groups of four, columns in steps of 16 (float32), 32 (bfloat16) or 64 (int8). For each group,
    for each step, for each of the four rows there is one word of the mask, whose bit b (little-endian) says
    whether column b of the step is kept; the kept values come in the same order. `starts[g]` is where the
    values of group g begin. Size of a 50 % bfloat16 matrix: 1.125 bytes an entry.

    int8 values are levels: entry = level x scale, one bfloat16 scale for `group` columns of a row.

    `pack` and `unpack` are inverse, to the bit for float32 and bfloat16. `check` refuses buffers that a
    kernel could not read safely.
    """

    shape: tuple[int, int]
    mask: Tensor  # uint8 [N padded * K padded / 8]
    values: Tensor  # [kept + TAIL]
    starts: Tensor  # int64 [N padded / 4 + 1]
    scales: Tensor | None = None  # bfloat16 [N padded, K padded / group]
    group: int = 0

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by name."""
        found = {"mask": self.mask, "values": self.values, "starts": self.starts}
        return found if self.scales is None else found | {"scales": self.scales}

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        keep: Tensor | None = None,
        dtype: torch.dtype | None = None,
        group: int = 128,
    ) -> Bitmask:
        """Store the entries that are kept: those that are not zero, where `keep` does not say.

        Args:
            weight: [N, K], any floating-point type.
            keep: [N, K] bool, entries to store; explicit zeros among them stay explicit.
            dtype: of the values: float32, bfloat16 or int8. None: that of the weight, float32 for float64.
            group: columns that share a scale, a multiple of 64; int8 only.

        Raises:
            SecateurError: for another type, shape or group.
            NonFiniteError: for NaN or infinite entries.
        """
        weight, keep, dtype = prepared(weight, keep, dtype, tuple(STEPS))
        if dtype == torch.int8 and (group < WIDTH or group % WIDTH):
            raise SecateurError(f"group=... is a multiple of {WIDTH}; got {group}.")
        group = group if dtype == torch.int8 else 0
        rows, columns = weight.shape
        pad = (0, -columns % max(WIDTH, group), 0, -rows % ROWS)
        weight, keep = F.pad(weight, pad), F.pad(keep, pad)
        scales = None
        if dtype == torch.int8:
            weight, scales = _levels(weight.float() * keep, group)
        step = STEPS[dtype]
        flat = _in_order(keep, step).numpy()
        mask = torch.from_numpy(np.packbits(flat, bitorder="little"))
        values = _in_order(weight.to(dtype), step)[torch.from_numpy(flat)]
        per_group = flat.reshape(-1, ROWS * keep.shape[1]).sum(axis=1)
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(per_group)]).astype(np.int64))
        values = torch.cat([values, values.new_zeros(TAIL)])
        return cls((rows, columns), mask, values, starts, scales, group)

    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """The dense matrix; float32 for int8 levels where `dtype` does not say."""
        N, K = self.padded
        step = STEPS[self.values.dtype]
        kept = torch.from_numpy(np.unpackbits(self.mask.cpu().numpy(), bitorder="little").view(bool))
        flat = self.values.new_zeros(N * K, device="cpu")
        flat[kept] = self.values[:-TAIL].cpu()
        dense = flat.view(N // ROWS, K // step, ROWS, step).transpose(1, 2).reshape(N, K)
        if self.scales is not None:
            dense = (dense.view(N, -1, self.group).float() * self.scales.cpu().float()[..., None]).view(N, K)
        rows, columns = self.shape
        dense = dense[:rows, :columns].contiguous().to(self.values.device)
        return dense if dtype is None else dense.to(dtype)

    def keep(self) -> Bool[Tensor, "N K"]:
        """Which entries are stored."""
        ones = self.values.new_ones(self.values.shape)
        return Bitmask(self.shape, self.mask, ones, self.starts, None, self.group).unpack() != 0

    def check(self, name: str = "the weight") -> None:
        """Raise `ArtifactError` unless sizes, types, counts and offsets agree: then reading is safe."""
        check_shape(name, self.shape, self.values)
        if self.values.dtype not in STEPS:
            raise unsound(name, f"its values are {self.values.dtype}")
        quantised = self.values.dtype == torch.int8
        if quantised != (self.scales is not None) or quantised != (self.group > 0) or self.group % WIDTH:
            raise unsound(name, f"its values are {self.values.dtype}, its group {self.group} columns")
        rows, columns = self.shape
        N, K = self.padded
        check_buffer(name, "mask", self.mask, torch.uint8, (N * K // 8,))
        check_buffer(name, "starts", self.starts, torch.int64, (N // ROWS + 1,))
        if self.scales is not None:
            check_buffer(name, "scales", self.scales, torch.bfloat16, (N, K // self.group))
        bits = _BITS[self.mask.cpu().numpy()].reshape(N // ROWS, -1).sum(axis=1, dtype=np.int64)
        starts = self.starts.cpu().numpy()
        if (
            starts[0] != 0
            or starts[-1] != self.values.numel() - TAIL
            or not np.array_equal(np.diff(starts), bits)
        ):
            raise unsound(name, "its mask, offsets and values do not agree on how many entries are kept")
        inside = F.pad(torch.ones(rows, columns, dtype=torch.bool), (0, K - columns, 0, N - rows))
        outside = ~_in_order(inside, STEPS[self.values.dtype]).numpy()
        if (np.packbits(outside, bitorder="little") & self.mask.cpu().numpy()).any():
            raise unsound(name, "its mask keeps entries outside its shape")

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with the padding."""
        rows, columns = self.shape
        width = max(WIDTH, self.group)
        return rows + -rows % ROWS, columns + -columns % width


def _in_order(matrix: Tensor, step: int) -> Tensor:
    """Entries in the order of the kernels, flat."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // ROWS, ROWS, columns // step, step).transpose(1, 2).reshape(-1)


def _levels(weight: Float[Tensor, "N K"], group: int) -> tuple[Tensor, Tensor]:
    """int8 levels [N, K] and bfloat16 scales [N, K / group]; off by at most half a scale."""
    grouped = weight.view(weight.shape[0], -1, group)
    exact = grouped.abs().amax(-1) / 127
    # Scales are rounded before levels are chosen, so rounding them costs nothing; the largest entry is
    # clamped where its scale was rounded down (by at most 2^-9 of it, half a level).
    scales = exact.to(torch.bfloat16)
    divisor = scales.float().masked_fill(scales == 0, 1.0)[..., None]
    return (grouped / divisor).round().clamp_(-127, 127).view_as(weight), scales
