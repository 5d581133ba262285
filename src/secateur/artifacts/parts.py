"""A safetensors file in parts: its header, checked like a stranger's, and the bytes of single tensors.

The safetensors library maps whole files into memory, which a limit on the address space forbids.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from secateur.artifacts.tensors import first_line
from secateur.core import files
from secateur.core.errors import ArtifactError

_LENGTH = 8  # bytes at the start of a file that hold the length of its header
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MOST_DIMENSIONS = 64  # as NumPy
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_DTYPES: Mapping[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: its type.
        shape: its sizes.
        begin: of its bytes, counted from the start of the file.
        end: one past its last byte.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors of a file; `ArtifactError` unless the whole header is sound."""
    text, start, size = _raw_header(path)
    try:
        header: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _unsound(path, f"its header is no valid JSON ({first_line(error).rstrip('.')})") from None
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _unsound(path, "its metadata is not text by name")
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _refuse_gaps(path, entries, start, size)
    return metadata, entries


def read_ranges(path: Path, ranges: Iterable[tuple[int, memoryview]]) -> None:
    """Fill each buffer with the bytes of a file from a position on; `ArtifactError` if it is too short."""
    with refusing(f"{path} cannot be read"), open(path, "rb", buffering=0) as f:
        for position, buffer in ranges:
            f.seek(position)
            while len(buffer):  # one read of the system ends at 2 GiB
                count = f.readinto(buffer)
                if not count:
                    raise _truncated(path, position + len(buffer))
                position, buffer = position + count, buffer[count:]


def write_range(path: Path, position: int, buffer: memoryview) -> None:
    """Overwrite bytes of a file, whose size stays; `ArtifactError` if they are not in it."""
    with refusing(f"{path} cannot be written"), open(path, "r+b", buffering=0) as f:
        if os.fstat(f.fileno()).st_size < position + len(buffer):
            raise _truncated(path, position + len(buffer))
        f.seek(position)
        while len(buffer):
            buffer = buffer[f.write(buffer) :]


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, of types too that NumPy lacks."""
    if not tensor.numel():  # may have any strides, which no view of bytes takes
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; `ArtifactError` if that fails."""
    with refusing(f"{path} cannot be written"):
        files.sync(path)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Make `ArtifactError` of an error of the operating system: `what` cannot be done, and why."""
    try:
        yield
    except OSError as error:
        advice = "; free space on its disk, then run this again" if error.errno in _FULL else ""
        raise ArtifactError(f"{what}: {error.strerror or error}{advice}.") from None


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Whether `value`, from JSON, is the shape of a tensor that torch can make."""
    if not _are_counts(value) or len(value) > _MOST_DIMENSIONS:
        return False
    return math.prod(max(size, 1) for size in value) < 2**63  # an empty tensor has strides too


def _raw_header(path: Path) -> tuple[bytes, int, int]:
    """The text of the header, where the data begin, the size of the file."""
    with refusing(f"{path} cannot be read"), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(_LENGTH), "little")
        if size < _LENGTH or length > _LONGEST_HEADER:
            raise _unsound(path, "it does not begin with the length of a header")
        if length > size - _LENGTH:
            raise _truncated(path, _LENGTH + length)
        text = f.read(length)
    if text[:1] != b"{":
        raise _unsound(path, "its header is no JSON object")
    return text, _LENGTH + length, size


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    "".join(found).encode()  # raises for halves of characters, which JSON can escape
    return found


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not is_shape(shape):
        raise _unsound(path, f"it has no valid dtype and shape of {_shown(name)}")
    if dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ArtifactError(
            f"{path} holds {_shown(name)} in the dtype {_shown(dtype)}, which is none of {known}: convert it."
        )
    if not (_are_counts(offsets) and len(offsets) == 2):
        raise _unsound(path, f"it has no valid data_offsets of {_shown(name)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _unsound(path, f"the data_offsets of {_shown(name)} do not fit its dtype and shape")
    return Entry(path, _DTYPES[dtype], tuple(shape), start + begin, start + end)


def _refuse_gaps(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """As the safetensors library does: the tensors follow each other and fill the file."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise _unsound(path, f"{_shown(name)} overlaps another tensor")
        if entry.begin > position:
            raise _unsound(path, f"there is a gap before {_shown(name)}")
        position = entry.end
    if position > size:
        raise _truncated(path, position)
    if position < size:
        raise _unsound(path, f"{size - position:,} bytes follow its last tensor")


def _shown(text: str) -> str:
    """Text from a file in a message: short, and nothing that a terminal would obey."""
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def _unsound(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is not a sound safetensors file: {why}. Copy or download it again.")


def _truncated(path: Path, end: int) -> ArtifactError:
    return ArtifactError(
        f"{path} is truncated: it ends before byte {end:,}, which it should have. Copy or download it again."
    )
