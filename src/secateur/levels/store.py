"""Where the weights of layers at their levels are: in memory, or a file for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.errors import ArtifactError
from secateur.core.files import replacing


@runtime_checkable
class Store(Protocol):
    """Weights of a layer with so many units removed, and the error of its output."""

    def error(self, name: str, removed: int) -> float | None:
        """None if it is not there."""

    def weight(self, name: str, removed: int) -> Tensor:
        """In the shape and type of the parameter; not to be written to."""

    def put(self, name: str, removed: int, weight: Tensor, error: float) -> None:
        """Keep it."""


class Memory:
    """In the memory of the CPU."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], tuple[Tensor, float]] = {}

    def error(self, name: str, removed: int) -> float | None:
        found = self._found.get((name, removed))
        return None if found is None else found[1]

    def weight(self, name: str, removed: int) -> Tensor:
        return self._found[name, removed][0]

    def put(self, name: str, removed: int, weight: Tensor, error: float) -> None:
        self._found[name, removed] = weight.cpu(), error


class Folder:
    """One safetensors file for each layer and level, the error in its metadata; whole or not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._errors: dict[Path, float] = {}

    def error(self, name: str, removed: int) -> float | None:
        file = self._file(name, removed)
        if file not in self._errors:
            if not file.is_file():
                return None
            try:
                with safe_open(file, framework="pt") as f:
                    self._errors[file] = float(f.metadata()["error"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                raise ArtifactError(f"{file} is damaged: remove it, and the layer is solved again.") from None
        return self._errors[file]

    def weight(self, name: str, removed: int) -> Tensor:
        file = self._file(name, removed)
        try:
            with safe_open(file, framework="pt") as f:
                weight: Tensor = f.get_tensor("weight")
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read ({error}): run this again without it.") from None
        return weight

    def put(self, name: str, removed: int, weight: Tensor, error: float) -> None:
        file = self._file(name, removed)
        try:
            with replacing(file) as temporary:
                save_file({"weight": weight.cpu().contiguous()}, temporary, {"error": repr(error)})
        except (OSError, SafetensorError) as reason:
            raise ArtifactError(f"{file} cannot be written ({reason}): free space on its disk.") from None
        self._errors[file] = error

    def _file(self, name: str, removed: int) -> Path:
        return self._path / f"{name.replace(os.sep, '_')}-{removed}.safetensors"
