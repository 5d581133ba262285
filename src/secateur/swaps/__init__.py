"""Classes that modules get where their own forward cannot have other sizes than it was built with."""

from secateur.swaps.attention import SlimMultiheadAttention, Swapped, swap_

__all__ = ["SlimMultiheadAttention", "Swapped", "swap_"]
