"""Tensors with many zeros in fewer bytes: one bit an entry and the entries that are not zero.

`model.safetensors` becomes `model.packed.safetensors`, in which a packed tensor `w` is two: `w/mask` (bits in
row-major order, little-endian, zero after the last entry) and `w/values`; the metadata give its shape. What
would not get smaller is stored as it is. Lossless to the bit, -0.0 and NaN included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import ArtifactError

FORMAT = "secateur-packed-1"
_END = ".safetensors"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)


def packed_name(name: str) -> str:
    """Of the packed file that stands for a safetensors file."""
    return f"{name.removesuffix(_END)}.packed{_END}"


def stored_name(folder: Path, name: str) -> str:
    """The name under which a safetensors file is in a folder: its own, or that of the packed file."""
    packed = packed_name(name)
    return packed if not (folder / name).is_file() and (folder / packed).is_file() else name


def pack_file(path: Path) -> None:
    """Replace a safetensors file by the packed one."""
    tensors: dict[str, Tensor] = load_file(path)
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        parts = _packed(tensor)
        if parts is None:
            found[name] = tensor
        else:
            shapes[name] = list(tensor.shape)
            found |= {f"{name}/mask": parts[0], f"{name}/values": parts[1]}
    if len(found) != len(tensors) + len(shapes):
        raise ArtifactError(f"{path} has tensors whose names end in /mask or /values: save it uncompressed.")
    save_file(found, path.parent / packed_name(path.name), {"format": FORMAT, "packed": json.dumps(shapes)})
    path.unlink()


def read_packed(path: Path) -> dict[str, Tensor]:
    """All tensors of a packed file, dense; `ArtifactError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            meta: dict[str, str] = f.metadata() or {}
        tensors: dict[str, Tensor] = load_file(path)
        shapes = json.loads(meta.get("packed", "null"))
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a sound safetensors file: {error}") from None
    if meta.get("format") != FORMAT or not isinstance(shapes, dict):
        raise ArtifactError(f"{path} is not a packed file of this format ({FORMAT}).")
    for name, shape in shapes.items():
        tensors[name] = _unpacked(tensors, name, shape, path)
    return tensors


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    if not tensor.is_floating_point() or tensor.element_size() not in _WORDS or not tensor.numel():
        return None
    flat = tensor.contiguous().view(-1)
    kept = flat.view(_WORDS[flat.element_size()]) != 0
    size = -(-flat.numel() // 8) + int(kept.count_nonzero()) * flat.element_size()
    if size >= flat.numel() * flat.element_size():
        return None
    return torch.from_numpy(np.packbits(kept.numpy(), bitorder="little")), flat[kept]


def _unpacked(tensors: dict[str, Tensor], name: str, shape: Any, path: Path) -> Tensor:
    mask, values = tensors.pop(f"{name}/mask", None), tensors.pop(f"{name}/values", None)
    if mask is None or values is None or name in tensors or not _is_shape(shape):
        raise _unsound(path, name, "parts of it are missing or doubled")
    entries = math.prod(shape)
    if mask.dtype != torch.uint8 or mask.dim() != 1 or values.dim() != 1 or mask.numel() != -(-entries // 8):
        raise _unsound(path, name, f"its mask is not that of {entries} entries")
    if entries % 8 and int(mask[-1]) >> entries % 8:
        raise _unsound(path, name, "its mask has bits after the last entry")
    # int32 indices: an int64 copy of the mask would be eight times as large as need be.
    if int(_BITS[mask.to(torch.int32)].sum()) != values.numel():
        raise _unsound(path, name, "its mask and its values disagree")
    kept = np.unpackbits(mask.numpy(), count=entries, bitorder="little").view(bool)
    dense = values.new_zeros(entries)
    dense[torch.from_numpy(kept)] = values
    return dense.view(shape)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**48 for n in shape)


def _unsound(path: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: {name} cannot be unpacked, {why}.")


def any_name(files: Mapping[str, object], name: str) -> bool:
    """Whether a safetensors file is listed, packed or not."""
    return name in files or packed_name(name) in files
