"""Sparse models on an ordinary CPU: packed weights, compiled kernels, layers that use them where they win."""

from secateur.runtime.compress import CompressReport, LayerReport, compress, compress_
from secateur.runtime.formats import Bitmask, Indexed, Packed
from secateur.runtime.linear import SparseConv1x1, SparseLinear, dense_of
from secateur.runtime.native import kernels
from secateur.runtime.plan import Plan

__all__ = [
    "Bitmask",
    "CompressReport",
    "Indexed",
    "LayerReport",
    "Packed",
    "Plan",
    "SparseConv1x1",
    "SparseLinear",
    "compress",
    "compress_",
    "dense_of",
    "kernels",
]
