"""The layout for many tokens: more memory, and several times the speed.

The weight is written out as lists of columns that two neighbouring rows both keep, or only one of them; see
`Plan` in native/kernels.h. Derived data: it is not saved. In a plan of pairs, for processors that multiply
two bfloat16 at once, everything is said of pairs of columns, a pair being kept if one of the two is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.runtime import native
from secateur.runtime.formats import Packed

CHUNK, BLOCK = 64, 128  # rows and columns of a part
WIDTH = 64  # columns are padded to a multiple of it


@dataclass(frozen=True)
class Plan:
    """The lists.

    Bytes an entry at 50, 70, 90 % sparsity: 2.4, 1.5, 0.5 for float32 values, 1.4, 0.9, 0.3 for bfloat16 and
    1.7, 1.2, 0.5 for pairs of bfloat16.
    """

    shape: tuple[int, int]
    columns: int  # padded; pairs of them in a plan of pairs
    counts: Tensor  # uint8 [chunks, blocks, 32, 3]
    places: Tensor  # uint8
    values: Tensor  # float32 or bfloat16; int32 for pairs, whose bits are those of two bfloat16
    offsets: Tensor  # int64 [chunks * blocks + 1, 2]

    @classmethod
    def of(cls, packed: Packed, pairs: bool = False) -> Plan:
        """From a checked weight; int8 levels become float32.

        Args:
            packed: the weight.
            pairs: whether for pairs of columns: values and inputs are bfloat16 then.

        Raises:
            SecateurError: if no kernel could use it.
        """
        found = native.library()
        if found is None:
            raise SecateurError(f"The kernels in use ({native.kernels()}) have no form for many tokens.")
        bfloat16 = packed.values.dtype == torch.bfloat16
        if pairs and not (bfloat16 and native.pairs()):
            raise SecateurError(
                f"Kernels {native.kernels()} and values in {packed.values.dtype} allow no plan of pairs."
            )
        name, weight = native.weight(packed)
        columns = weight.columns + -weight.columns % WIDTH
        columns = columns // 2 if pairs else columns
        chunks, blocks = -(-packed.shape[0] // CHUNK), -(-columns // BLOCK)
        dtype = torch.int32 if pairs else torch.bfloat16 if bfloat16 else torch.float32
        kind = native.TYPES[dtype]
        offsets = torch.empty(chunks * blocks + 1, 2, dtype=torch.int64)
        getattr(found, f"secateur_{name}_offsets")(weight, kind, offsets.data_ptr())
        counts = torch.empty(chunks, blocks, CHUNK // 2, 3, dtype=torch.uint8)
        places = torch.empty(int(offsets[-1, 0]), dtype=torch.uint8)
        values = torch.empty(int(offsets[-1, 1]), dtype=dtype)
        buffers = (offsets.data_ptr(), counts.data_ptr(), places.data_ptr(), values.data_ptr())
        getattr(found, f"secateur_{name}_plan")(weight, kind, *buffers, torch.get_num_threads())
        return cls(packed.shape, columns, counts, places, values, offsets)

    @property
    def pairs(self) -> bool:
        """Whether it is one of pairs of columns: then inputs have to be bfloat16."""
        return self.values.dtype == torch.int32

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def buffers(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return self.counts, self.places, self.values, self.offsets

    def call(self) -> native.Call:
        """The kernel, valid as long as the buffers are where they are."""
        pointers = (b.data_ptr() for b in self.buffers())
        kind = native.TYPES[self.values.dtype]
        weight = native.CPlan(self.shape[0], self.columns, *pointers, kind)
        only = torch.bfloat16 if self.pairs else None
        return native.Call("planned", weight, self.shape[1], self.shape[0], only)
