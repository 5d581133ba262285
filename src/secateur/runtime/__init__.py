"""Sparse models on an ordinary CPU: packed weights, compiled kernels, layers that use them where they win."""

from secateur.runtime.bench import BenchReport, advise, bench, bench_text
from secateur.runtime.choose import Choice, Times
from secateur.runtime.compress import CompressReport, LayerReport, compress, compress_
from secateur.runtime.formats import Bitmask, Blocks, Indexed, Packed
from secateur.runtime.linear import SparseConv1x1, SparseLinear, dense_of
from secateur.runtime.native import kernels
from secateur.runtime.plan import Plan

__all__ = [
    "BenchReport",
    "Bitmask",
    "Blocks",
    "Choice",
    "CompressReport",
    "Indexed",
    "LayerReport",
    "Packed",
    "Plan",
    "SparseConv1x1",
    "SparseLinear",
    "Times",
    "advise",
    "bench",
    "bench_text",
    "compress",
    "compress_",
    "dense_of",
    "kernels",
]
