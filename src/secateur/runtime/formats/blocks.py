"""Blocks of 16 rows by one column: for weights that were pruned so.

Shape letters: N rows (outputs) and K columns (inputs) of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from secateur.runtime.formats.common import (
    TAIL,
    check_buffer,
    check_indices,
    check_shape,
    columns_of,
    indices_of,
    prepared,
    unsound,
)
from secateur.runtime.formats.indexed import DTYPES

ROWS = 16  # of a block, which is one column wide


@dataclass(frozen=True)
class Blocks:
    """Column (16 bits) and sixteen values of each block that is kept; `starts[g]` is where rows 16 g begin.

    Nothing has to be spread out, so it is the fastest format for weights that were pruned in such blocks,
    `Block(16, 1)`; zeros within a kept block are stored. `pack` and `unpack` are inverse, to the bit. `check`
    refuses buffers that a kernel could not read safely.
    """

    group: ClassVar[int] = ROWS  # tells its buffers from those of `Indexed`

    shape: tuple[int, int]
    columns: Tensor  # int16 [blocks], the bits of unsigned numbers, which torch cannot pickle
    values: Tensor  # [16 blocks + TAIL]
    starts: Tensor  # int64 [N padded / 16 + 1], in blocks

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by name."""
        return {"columns": self.columns, "values": self.values, "starts": self.starts}

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        keep: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Blocks:
        """Store the blocks in which anything is kept: what is not zero, where `keep` does not say.

        Args:
            weight: [N, K], any floating-point type, at most 65536 columns.
            keep: [N, K] bool, entries to store.
            dtype: of the values: float32 or bfloat16. None: that of the weight, float32 for others.

        Raises:
            SecateurError: for another type or shape.
            NonFiniteError: for NaN or infinite entries.
        """
        weight, keep, dtype = prepared(weight, keep, dtype, DTYPES)
        rows, columns = weight.shape
        blocks = in_blocks(keep).any(-1)
        values = in_blocks((weight * keep).to(dtype))[blocks].flatten()
        starts = F.pad(blocks.sum(1, dtype=torch.int64).cumsum(0), (1, 0))
        return cls(
            (rows, columns), indices_of(blocks.nonzero()[:, 1], columns), F.pad(values, (0, TAIL)), starts
        )

    def unpack(self, dtype: torch.dtype | None = None) -> Float[Tensor, "N K"]:
        """The dense matrix."""
        rows, columns = self.shape
        counts = self.starts.diff()
        dense = self.values.new_zeros(len(counts), columns, ROWS)
        group = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        dense[group, columns_of(self.columns)] = self.values[:-TAIL].view(-1, ROWS)
        flat = dense.transpose(1, 2).reshape(-1, columns)[:rows].contiguous()
        return flat if dtype is None else flat.to(dtype)

    def check(self, name: str = "the weight") -> None:
        """Raise `ArtifactError` unless sizes, types and offsets agree: then reading is safe."""
        check_shape(name, self.shape, self.values)
        if self.values.dtype not in DTYPES:
            raise unsound(name, f"its values are {self.values.dtype}")
        kept = self.values.numel() - TAIL
        if kept % ROWS:
            raise unsound(name, f"its {kept} values are not in blocks of {ROWS}")
        check_buffer(name, "columns", self.columns, torch.int16, (kept // ROWS,))
        check_buffer(name, "starts", self.starts, torch.int64, (-(-self.shape[0] // ROWS) + 1,))
        check_indices(name, self.columns, self.starts, self.shape[1])
        last = self.values[:-TAIL].view(-1, ROWS)[int(self.starts[-2]) :, self.shape[0] % ROWS or ROWS :]
        if bool((last != 0).any()):
            raise unsound(name, "it has values in rows outside its shape")


def in_blocks(matrix: Tensor) -> Tensor:
    """[N, K] as [N padded / 16, K, 16]."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, 0, 0, -rows % ROWS)).view(-1, ROWS, columns).transpose(1, 2)
