"""Sparse matrices as the kernels read them: packing, unpacking, and the checks that make reading safe."""

from secateur.runtime.formats.bitmask import Bitmask
from secateur.runtime.formats.blocks import Blocks
from secateur.runtime.formats.common import TAIL, Packed
from secateur.runtime.formats.indexed import Indexed

__all__ = ["TAIL", "Bitmask", "Blocks", "Indexed", "Packed"]
