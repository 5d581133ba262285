"""The weights of a model larger than memory: read, copied and overwritten tensor by tensor."""

from __future__ import annotations

import glob
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from secateur.artifacts.hf_folder import INDEX, weight_files
from secateur.artifacts.manifest import WEIGHTS, read_json
from secateur.artifacts.packed import stored_name
from secateur.artifacts.parts import Entry, as_bytes, read_header, read_ranges, refusing, sync, write_range
from secateur.artifacts.tensors import listed
from secateur.core.errors import ArtifactError
from secateur.core.files import replacing

_CHUNK = 4 * 2**20  # bytes


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a model folder; of their contents only the headers are in memory.

    Since a pruned tensor keeps its dtype and shape, a pruned checkpoint is a copy of the files in which the
    bytes of some tensors are overwritten:

        copies = Shards.open(source).copy_files(target)
        copies.write(name, pruned)
        copies.flush()

    Attributes:
        folder: that the files lie in.
        files: their names, the index last if there is one.
        entries: where each tensor lies.
    """

    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    _written: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Read the headers in `folder`; `ArtifactError` if files are missing, unsound or contradictory."""
        files = weight_files(folder)
        for name in files:
            if stored_name(folder, name) != name:
                raise ArtifactError(
                    f"{folder} is compressed, and cannot be read piece by piece: load it with secateur.load "
                    "and save it without compressed=True."
                )
        entries: dict[str, Entry] = {}
        for file in files:
            _, part = read_header(folder / file)
            if twice := part.keys() & entries.keys():
                raise ArtifactError(f"{folder / file} holds {listed(twice)}, which another shard holds too.")
            entries.update(part)
        if files == [WEIGHTS]:
            return cls(folder, (WEIGHTS,), entries)
        _refuse_other_index(folder / INDEX, entries)
        return cls(folder, (*files, INDEX), entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors."""
        return tuple(self.entries)

    @property
    def total_bytes(self) -> int:
        """Of all tensors, without headers."""
        return sum(entry.bytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, its dtype and shape; `ArtifactError` if there is none of that name."""
        if name not in self.entries:
            raise ArtifactError(f"{self.folder} holds no tensor {name}: is it the checkpoint of this model?")
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, each in memory of its own; `ArtifactError` if one is missing or cut short."""
        entries = {name: self.entry(name) for name in names}
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        ranges: dict[Path, list[tuple[int, memoryview]]] = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            ranges.setdefault(entry.file, []).append((entry.begin, as_bytes(tensors[name])))
        for file, parts in ranges.items():
            read_ranges(file, parts)
        return tensors

    def copy_files(self, target: Path, *, resume: bool = False) -> Shards:
        """Copy the files into an existing folder, and open the copies.

        A file appears under its name only when it is whole. So with `resume`, one that is there in the right
        size is left as it is: a copy, in which tensors may have been overwritten since.

        Raises `ArtifactError` if the folder is not fit for it or the disk too small.
        """
        self._refuse_target(target)
        _remove_leftovers(target, self.files)
        with refusing(f"The files of {self.folder} cannot be copied"):
            sizes = {name: (self.folder / name).stat().st_size for name in self.files}
            if resume:
                sizes = {n: s for n, s in sizes.items() if not _is_copied(self.folder / n, target / n)}
            _refuse_small_disk(target, sum(sizes.values()))
        for name, size in sizes.items():
            _copy(self.folder / name, target / name, size)
        # Else a power cut could undo a renaming, and a resumed run would copy over what it had written.
        sync(target)
        copies = Shards.open(target)
        if {n: replace(e, file=self.folder / e.file.name) for n, e in copies.entries.items()} != self.entries:
            raise ArtifactError(f"{target} holds other weights than {self.folder}: choose an empty folder.")
        return copies

    def write(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor by another of its dtype and shape; on the disk for sure after `flush`.

        Raises `ArtifactError` if dtype or shape differ, or the disk fails.
        """
        entry = self.entry(name)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            new, old = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, entry))
            raise ArtifactError(f"{name} is {old} in {entry.file} and must stay so, but was given as {new}.")
        self._written.add(entry.file)
        plain = tensor.detach().cpu().resolve_conj().contiguous()
        write_range(entry.file, entry.begin, as_bytes(plain))

    def flush(self) -> None:
        """Wait until all that was written is on the disk."""
        for file in sorted(self._written):
            sync(file)
            self._written.remove(file)

    def _refuse_target(self, target: Path) -> None:
        if not target.is_dir():
            raise ArtifactError(f"There is no folder {target} to copy the weights into: make it first.")
        if target.samefile(self.folder):
            raise ArtifactError(f"{target} is where the weights come from: choose another folder.")
        if WEIGHTS not in self.files and (target / WEIGHTS).exists():
            raise ArtifactError(
                f"{target} holds another model, in {WEIGHTS}, which would be loaded instead of the shards: "
                "choose an empty folder."
            )


def _refuse_other_index(index: Path, entries: Mapping[str, Entry]) -> None:
    """Raise `ArtifactError` unless the index says of each tensor in which shard it is."""
    listed_files = read_json(index)["weight_map"]
    for name, file in listed_files.items():
        if name not in entries or entries[name].file.name != file:
            raise ArtifactError(
                f"{index} lists {name!r} in {file}, which does not hold it: copy or download all files again."
            )
    if extra := entries.keys() - listed_files.keys():
        file = entries[min(extra)].file
        raise ArtifactError(f"{file} holds {listed(extra)}, which {index.name} does not list: copy it again.")


def _remove_leftovers(target: Path, names: Iterable[str]) -> None:
    """Remove the temporary files of `replacing` that a killed process left, which are as large as shards."""
    for name in names:
        for path in target.glob(f".{glob.escape(name)}.{'?' * 8}"):
            path.unlink(missing_ok=True)


def _is_copied(source: Path, target: Path) -> bool:
    """Not by a link: what is written to the copy would change the source."""
    if target.is_symlink() or not target.is_file() or target.samefile(source):
        return False
    return target.stat().st_size == source.stat().st_size


def _refuse_small_disk(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        # Rounded apart, so that the two numbers never look the same.
        asked, there = math.ceil(needed / 1e7) / 100, math.floor(free / 1e7) / 100
        raise ArtifactError(
            f"The weights need {asked:,.2f} GB, but the disk of {target} has {there:,.2f} GB free: make "
            "space or choose another folder."
        )


def _copy(source: Path, target: Path, size: int) -> None:
    with (
        refusing(f"{source} cannot be copied to {target}"),
        replacing(target) as temporary,
        open(source, "rb") as read,
        open(temporary, "wb") as written,
    ):
        shutil.copyfileobj(read, written, _CHUNK)
        if written.tell() != size:
            raise ArtifactError(f"{source} changed while it was copied: run this again.")
