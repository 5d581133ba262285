"""The compiled kernels, through their C interface.

The library is built with the package and links neither Python nor torch. Where it is missing, everything is
computed by torch and `kernels()` says so. The environment variable SECATEUR_KERNELS names the kernels to use
("avx512bf16", "avx512vbmi2", "avx512f", "avx2", "neon", "portable", or "torch" for none) instead of the best
for this processor.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.errors import SecateurError
from secateur.runtime.formats import Bitmask, Blocks, Indexed, Packed

VERSION = 2  # of the interface
FILE = Path(__file__).parent / "_native.so"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}  # int32: pairs of bfloat16


class CBitmask(ctypes.Structure):
    """`Bitmask` of native/kernels.h."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("mask", c_void_p),
        ("values", c_void_p),
        ("starts", c_void_p),
        ("scales", c_void_p),
        ("group", c_int64),
        ("type", c_int32),
    ]


class CIndexed(ctypes.Structure):
    """`Indexed` and `Blocks` of native/kernels.h."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("indices", c_void_p),
        ("values", c_void_p),
        ("starts", c_void_p),
        ("type", c_int32),
    ]


class CPlan(ctypes.Structure):
    """`Plan` of native/kernels.h."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("counts", c_void_p),
        ("places", c_void_p),
        ("values", c_void_p),
        ("offsets", c_void_p),
        ("type", c_int32),
    ]


class CDense(ctypes.Structure):
    """`Dense` of native/kernels.h."""

    _fields_ = [("rows", c_int64), ("columns", c_int64), ("values", c_void_p), ("type", c_int32)]


def _signatures(library: ctypes.CDLL) -> None:
    library.secateur_version.restype = c_int32
    library.secateur_kernels.restype = c_char_p
    library.secateur_choose.argtypes = [c_char_p]
    library.secateur_choose.restype = c_int32
    library.secateur_usable.argtypes = [c_int32]
    library.secateur_usable.restype = c_char_p
    library.secateur_pairs.restype = c_int32
    library.secateur_borrow_threads.argtypes = [c_void_p]
    tail = [c_int64, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_int32]
    weights: dict[str, type[ctypes.Structure]] = {
        "bitmask": CBitmask,
        "indexed": CIndexed,
        "blocks": CIndexed,
    }
    many = {f"{name}_many": weight for name, weight in weights.items()}
    for name, weight in (weights | many | {"planned": CPlan, "dense": CDense}).items():
        function = getattr(library, f"secateur_{name}_linear")
        function.argtypes = [POINTER(weight), *tail]
        function.restype = None
    for name, weight in weights.items():
        offsets, plan = (getattr(library, f"secateur_{name}_{what}") for what in ("offsets", "plan"))
        offsets.argtypes = [POINTER(weight), c_int32, c_void_p]
        plan.argtypes = [POINTER(weight), c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int32]
        offsets.restype = plan.restype = None


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where there are none; `SecateurError` if SECATEUR_KERNELS names others."""
    wanted = os.environ.get("SECATEUR_KERNELS", "")
    if wanted == "torch" or (not wanted and not FILE.is_file()):
        return None
    try:
        found = ctypes.CDLL(str(FILE))
        if found.secateur_version() != VERSION:
            raise OSError("it is of another version of Secateur")
    except (OSError, AttributeError) as error:
        if wanted:
            raise SecateurError(f"SECATEUR_KERNELS={wanted}, but there are no kernels: {error}.") from None
        return None
    _signatures(found)
    if found.secateur_choose(wanted.encode()):
        raise SecateurError(f"SECATEUR_KERNELS={wanted}: here are {', '.join(_usable(found))} and torch.")
    # Torch's OpenMP runtime, where it is GNU's or speaks its language: its threads are there already.
    found.secateur_borrow_threads(getattr(ctypes.CDLL(None), "GOMP_parallel", None))
    return found


def kernels() -> str:
    """The kernels in use: an instruction set ("avx2"), "portable", or "torch" where none are compiled."""
    found = library()
    return "torch" if found is None else str(found.secateur_kernels().decode())


def usable() -> list[str]:
    """The kernels that this processor can run, the best first; "torch" is always the last."""
    found = library()
    return [*([] if found is None else _usable(found)), "torch"]


def _usable(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while (name := library.secateur_usable(len(names))) is not None:
        names.append(name.decode())
    return names


@cache
def pairs() -> bool:
    """Whether the kernels multiply two bfloat16 columns at once: then a plan may hold pairs of them."""
    found = library()
    return found is not None and bool(found.secateur_pairs())


def weight(packed: Packed) -> tuple[str, CBitmask | CIndexed]:
    """For the kernels: what the names of its functions begin with, and the weight.

    It is valid as long as the buffers are where they are.
    """
    if isinstance(packed, Bitmask):
        return "bitmask", _bitmask(packed)
    if isinstance(packed, Indexed):
        return "indexed", _indexed(packed, packed.indices)
    if isinstance(packed, Blocks):
        return "blocks", _indexed(packed, packed.columns)
    raise SecateurError(f"There is no kernel for {type(packed).__name__}.")


def _bitmask(packed: Bitmask) -> CBitmask:
    scales = None if packed.scales is None else packed.scales.data_ptr()
    buffers = (packed.mask.data_ptr(), packed.values.data_ptr(), packed.starts.data_ptr(), scales)
    return CBitmask(packed.shape[0], packed.padded[1], *buffers, packed.group, TYPES[packed.values.dtype])


def _indexed(packed: Indexed | Blocks, columns: Tensor) -> CIndexed:
    buffers = (columns.data_ptr(), packed.values.data_ptr(), packed.starts.data_ptr())
    return CIndexed(*packed.shape, *buffers, TYPES[packed.values.dtype])


class Call:
    """A weight and the kernel that multiplies with it: from x[..., K] y[..., N], in the type of x."""

    def __init__(
        self, name: str, weight: ctypes.Structure, width: int, rows: int, only: torch.dtype | None = None
    ) -> None:
        found = library()
        assert found is not None
        self._function = getattr(found, f"secateur_{name}_linear")
        self._weight, self._width, self._rows = weight, width, rows
        self._pointer = byref(weight)
        self.only = only  # the type that x must have
        self.otherwise = self  # what does other types
        self.keep: object = None  # what must live as long as this

    def __call__(self, x: Tensor, tokens: int, bias: Tensor | None) -> Tensor:
        """`x` is float32 or bfloat16, contiguous, and holds so many tokens; `bias` is float32 or None."""
        y = x.new_empty((*x.shape[:-1], self._rows))
        self._function(
            self._pointer,
            self._width,
            x.data_ptr(),
            tokens,
            TYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y
