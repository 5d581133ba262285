"""Passes over whole weights that torch's own operators make several times slower than memory.

Both work on chunks that stay in the second-level cache. Measured on 16 M float32 values with one thread:
`masked_fill_` 62 ms against 5 ms here, `count_nonzero` 71 ms against 6 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def count_nonzero(tensor: Tensor) -> int:
    """Entries that are not zero, as a number."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bool:
        return int(flat.count_nonzero())
    return sum(int((chunk != 0).count_nonzero()) for chunk in flat.split(CHUNK))


@torch.no_grad()
def zero_(tensor: Tensor, keep: Tensor) -> None:
    """Set the entries of `tensor` that `keep` does not keep to zero, in place; NaN and infinity too.

    The bits of each entry are and-ed with all ones or all zeros, which, unlike a product, has no exceptions.
    """
    tensor = tensor.detach()
    bits = _BITS.get(tensor.dtype)
    if bits is None:
        tensor.masked_fill_(~keep, 0)
        return
    if tensor.numel() <= CHUNK:
        tensor.view(bits).bitwise_and_(keep.to(bits).neg_())
        return
    flat, flat_keep = _flat(tensor), _flat(keep)
    if flat is None or flat_keep is None or tensor.stride() != keep.stride():
        tensor.masked_fill_(~keep, 0)
        return
    for chunk, kept in zip(flat.view(bits).split(CHUNK), flat_keep.split(CHUNK), strict=True):
        chunk.bitwise_and_(kept.to(bits).neg_())


def _flat(tensor: Tensor) -> Tensor | None:
    """All entries in storage order, without a copy; None where the storage has gaps."""
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return tensor.as_strided((tensor.numel(),), (1,)) if dense else None
