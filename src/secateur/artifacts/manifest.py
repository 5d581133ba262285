"""`secateur.json`: what a folder holds, with the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch

from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.record import versions

NAME = "secateur.json"
MASKS = "masks.safetensors"
WEIGHTS = "model.safetensors"
PRUNED = "pruned.safetensors"
SURGERY = "surgery.json"
FORMAT = 1
_LARGEST_JSON = 64 * 2**20  # bytes; ours are some kilobytes, an index of a very large model some megabytes
_CHUNK = 2**20

# A table, since looking up names from a file in torch itself could import its submodules.
DTYPES: Mapping[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype) and d.is_floating_point
}
"""Floating-point types by name: "float32" and so on."""

Ties = tuple[tuple[str, ...], ...]
"""Groups of names that are one tensor; the first name of each is the one that is stored."""


@dataclass(frozen=True)
class File:
    """One file as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of `secateur.json`.

    Attributes:
        kind: "hf" for a Hugging Face model, "module" for any other.
        class_name: of the saved model, for messages; it is never imported from here.
        files: every other file of the artifact.
        tied: groups of names that are one tensor.
        dtypes: of the floating-point tensors of a Hugging Face model, which its loader would make alike:
            by name, "*" for all that are not named.
        settings: what was done to the model, as in the report.
    """

    kind: Literal["hf", "module"]
    class_name: str
    files: Mapping[str, File]
    tied: Ties
    dtypes: Mapping[str, str]
    settings: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Write `secateur.json` into `folder`."""
        data = {
            "format": FORMAT,
            "secateur": versions().get("secateur", "unknown"),
            "kind": self.kind,
            "class": self.class_name,
            "files": {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in self.files.items()},
            "tied": [list(group) for group in self.tied],
            "dtypes": dict(self.dtypes),
            "settings": dict(self.settings),
        }
        write_text(folder / NAME, json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `secateur.json`; `ArtifactError` if it is damaged or of another format."""
        path = folder / NAME
        data = read_json(path)
        if type(data.get("format")) is int and data["format"] > FORMAT:
            raise ArtifactError(f"{path} has format {data['format']}, newer than {FORMAT}: update Secateur.")
        if data.get("format") is True or data.get("format") != FORMAT:
            raise ArtifactError(f"{path} has no known format number: something else wrote it.")
        for field, is_sound in _FIELDS.items():
            if not is_sound(data.get(field)):
                raise ArtifactError(f"{path} has no valid {field!r}: it is damaged or not Secateur's.")
        for name in data["files"]:
            if not is_plain_name(name) or name == NAME:
                raise ArtifactError(f"{path} lists {name!r}, which is no name of a file beside it: refused.")
        files = {name: File(f["sha256"], f["bytes"]) for name, f in data["files"].items()}
        tied = tuple(tuple(group) for group in data["tied"])
        return cls(data["kind"], data["class"], files, tied, data["dtypes"], data["settings"])

    def verify(self, folder: Path) -> None:
        """Raise `ArtifactError`, naming the file, unless every listed file is as it was written."""
        for name, file in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: {NAME} lists it, so copy the whole folder again.")
            size = path.stat().st_size
            if size != file.bytes:
                what = "cut short" if size < file.bytes else "changed"
                raise ArtifactError(f"{path} was {what}: {size:,} bytes instead of {file.bytes:,}.")
            if fingerprint(path).sha256 != file.sha256:
                raise ArtifactError(f"{path} is corrupt or was changed: {NAME} has another SHA-256 for it.")


def fingerprint(path: Path) -> File:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as f:
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from None
    return File(digest.hexdigest(), size)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `ArtifactError` if it is missing, unreadable, too large or no object."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtifactError(f"{path} has more than {_LARGEST_JSON:,} bytes, too many for what it is.")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} does not hold a JSON object.")
    return data


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file directly in the folder that it is looked up in."""
    if name in ("", ".", "..") or not name.isprintable() or any(c in "/\\:" for c in name):
        return False
    return len(name.encode()) <= 255  # the longest name on common file systems


def _are_strings(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(f, dict) and isinstance(f.get("sha256"), str) and type(f.get("bytes")) is int
        for f in value.values()
    )


def _are_groups(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(group, list) and len(group) > 1 for group in value):
        return False
    names = [name for group in value for name in group]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _are_dtypes(value: Any) -> bool:
    return _are_strings(value) and set(value.values()) <= DTYPES.keys() and (not value or "*" in value)


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "kind": lambda value: value in ("hf", "module"),
    "class": lambda value: isinstance(value, str),
    "files": _are_files,
    "tied": _are_groups,
    "dtypes": _are_dtypes,
    "settings": _are_strings,
}


def fingerprints(paths: Iterable[Path]) -> dict[str, File]:
    """The `files` of a manifest."""
    return {path.name: fingerprint(path) for path in sorted(paths)}
