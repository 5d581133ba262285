"""Quantisation after pruning: weights on a grid of few bits, with every zero in its place."""

from secateur.int8.grid import scales_of
from secateur.int8.solve import AsPruned, Quantized, quantized
from secateur.int8.whole import QuantizeReport, quantize_

__all__ = ["AsPruned", "QuantizeReport", "Quantized", "quantize_", "quantized", "scales_of"]
