"""What a run has done so far, so that the same command goes on where it was killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.artifacts.manifest import read_json
from secateur.collect.batches import Batch
from secateur.core.digest import take
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.reconstruct.passes import Chain
from secateur.record import versions

_NAME = "journal.json"
_FORMAT = 1


@dataclass
class Solved:
    """One layer of a finished block.

    Attributes:
        removed: weights that the mask removes.
        zeros: weights that are zero now.
        were_zero: weights that were zero before.
        error: of the layer's output.
        notes: of the solver.
        tuned: see `Done`.
    """

    removed: int
    zeros: int
    were_zero: int
    error: float
    notes: list[str] = field(default_factory=list)
    tuned: float | None = None


@dataclass
class Journal:
    """The state of a run, in one file that is replaced when a block is finished.

    Attributes:
        key: digest of all that decides the result.
        blocks: the chain of blocks.
        follows: see `Chain`.
        before: see `Chain`.
        heard: see `Chain`.
        shares: sparsity of every layer.
        next: so many blocks are done.
        layers: what is known of the layers that are.
        seconds: time spent so far.
        states: bytes of hidden states in memory at most.
        peak: bytes of memory at most.
    """

    key: str
    blocks: list[str] = field(default_factory=list)
    follows: list[bool] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    heard: dict[str, list[int]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    next: int = 0
    layers: dict[str, Solved] = field(default_factory=dict)
    seconds: float = 0.0
    states: int = 0
    peak: int = 0

    @property
    def chain(self) -> Chain:
        """The blocks as a chain."""
        return Chain(tuple(self.blocks), tuple(self.follows), self.before, self.heard)

    def write(self, folder: Path) -> None:
        """Replace the file."""
        write_text(folder / _NAME, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def remove(folder: Path) -> None:
        """Nothing in the folder can be resumed any more."""
        (folder / _NAME).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, key: str) -> Journal | None:
        """The journal in a folder; None if there is none.

        Raises `ArtifactError` if it is that of another run, or damaged.
        """
        path = folder / _NAME
        if not path.is_file():
            return None
        data = read_json(path)
        if data.pop("format", None) != _FORMAT or data.get("key") != key:
            raise ArtifactError(
                f"{folder.parent} holds an unfinished run with other settings, data, files or versions: "
                f"remove {folder} to begin anew, or choose another folder."
            )
        try:
            layers = {name: Solved(**one) for name, one in data.pop("layers").items()}
            return cls(**data, layers=layers)
        except (TypeError, KeyError, AttributeError):
            raise ArtifactError(f"{path} is damaged: remove {folder} to begin anew.") from None


def digest(settings: Mapping[str, str], files: Mapping[str, str], data: Sequence[Batch]) -> str:
    """A digest of all that decides a result: settings, source, data, versions, number of threads."""
    found = hashlib.sha256()
    known: dict[str, Any] = {
        "settings": dict(settings),
        "files": dict(files),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    found.update(json.dumps(known, sort_keys=True).encode())
    for batch in data:
        for leaf in tree_leaves((batch.args, batch.kwargs)):
            if isinstance(leaf, Tensor):
                take(found, leaf)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()
