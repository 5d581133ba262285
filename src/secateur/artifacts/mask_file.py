"""The file of `Masks.save`, written mask by mask: for models whose masks together do not fit in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.artifacts.parts import Entry, is_shape, read_header, read_ranges, refusing, sync, write_range
from secateur.core.errors import ArtifactError
from secateur.core.files import replacing
from secateur.masks import FORMAT

_CHUNK = 4 * 2**20  # bytes
_NO_DIGEST = "0" * 64  # until `finish`: `Masks.load` refuses the file


@dataclass(frozen=True)
class MaskFile:
    """A mask file in the making, which `Masks.load` reads once it is finished.

    It has its final size from the start; a mask that was not written removes everything. After a crash it is
    opened again and continued.

    Attributes:
        path: of the file.
        shapes: of the masks, by name of parameter.
        entries: where the packed bits lie.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    entries: Mapping[str, Entry]

    @classmethod
    def create(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> MaskFile:
        """Lay out a new file for masks of these shapes; `ArtifactError` if it cannot be written."""
        header = _header(shapes, _NO_DIGEST)
        with refusing(f"{path} cannot be written"), replacing(path) as temporary:
            with open(temporary, "wb") as f:
                f.write(header)
                f.truncate(len(header) + sum(_packed_size(shape) for shape in shapes.values()))
            cls.open(temporary)  # what could not be continued is refused at once
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> MaskFile:
        """Continue a file that `create` made, finished or not; `ArtifactError` if it is anything else."""
        if not path.is_file():
            raise ArtifactError(f"There is no mask file {path}.")
        metadata, entries = read_header(path)
        if metadata.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a mask file of this format ({FORMAT}).")
        shapes, digest = _read_shapes(metadata.get("shapes", "")), metadata.get("sha256", "")
        if shapes is not None and len(digest) == len(_NO_DIGEST) and digest.isalnum() and digest.isascii():
            header = _header(shapes, digest)
            found = bytearray(min(len(header), path.stat().st_size))
            read_ranges(path, [(0, memoryview(found))])
            if found == header:
                return cls(path, shapes, entries)
        raise ArtifactError(f"{path} is damaged, or no mask file that can be continued: make it anew.")

    def write(self, name: str, mask: Tensor) -> None:
        """Pack a boolean tensor, True meaning keep, into its place; on the disk for sure after `finish`.

        Raises `ArtifactError` if the file has no mask of that name and shape, or the disk fails.
        """
        if name not in self.shapes:
            raise ArtifactError(f"{self.path} was laid out without a mask of {name}.")
        if mask.dtype != torch.bool or tuple(mask.shape) != self.shapes[name]:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise ArtifactError(f"The mask of {name} is {found}, not boolean {self.shapes[name]}.")
        packed = np.packbits(mask.cpu().numpy().reshape(-1))
        write_range(self.path, self.entries[name].begin, packed.data)

    def finish(self) -> None:
        """Enter the checksum of what was written, and wait until the file is on the disk."""
        sync(self.path)
        write_range(self.path, 0, memoryview(_header(self.shapes, self._digest())))
        sync(self.path)

    def _digest(self) -> str:
        """As `Masks.load` computes it, without holding a whole mask."""
        digest, buffer = sha256(_shapes_text(self.shapes).encode()), memoryview(bytearray(_CHUNK))
        for name in sorted(self.shapes):
            digest.update(name.encode() + np.dtype(np.uint8).str.encode())
            entry = self.entries[name]
            for position in range(entry.begin, entry.end, _CHUNK):
                part = buffer[: min(_CHUNK, entry.end - position)]
                read_ranges(self.path, [(position, part)])
                digest.update(part)
        return digest.hexdigest()


def _header(shapes: Mapping[str, tuple[int, ...]], digest: str) -> bytes:
    """Length and text of the header, in the order in which the safetensors library writes it."""
    metadata = {"format": FORMAT, "sha256": digest, "shapes": _shapes_text(shapes)}
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name in sorted(shapes):
        size = _packed_size(shapes[name])
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _packed_size(shape: tuple[int, ...]) -> int:
    """Bytes of a mask at one bit a weight."""
    return math.ceil(math.prod(shape) / 8)


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return json.dumps({name: list(shape) for name, shape in shapes.items()})


def _read_shapes(text: str) -> dict[str, tuple[int, ...]] | None:
    """What `_shapes_text` wrote; None if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(is_shape(shape) for shape in found.values()):
        return None
    return {name: tuple(shape) for name, shape in found.items()}
