"""Finished trainings in folders named by what decided them, and an index of them."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import ArtifactError
from secateur.core.files import sync, write_text
from secateur.lottery.trial import State
from secateur.masks import Masks

_JOB, _INDEX = "training.json", "index.sqlite"
_WEIGHTS, _MASKS, _STATE = "weights.safetensors", "masks.safetensors", "state.safetensors"
_ABANDONED = 3600.0  # seconds after which an unfinished folder is that of a killed process
_TABLE = (
    "CREATE TABLE IF NOT EXISTS trainings (key TEXT PRIMARY KEY, branch TEXT, level INTEGER, seed INTEGER, "
    "density REAL, result TEXT, steps INTEGER, seconds REAL)"
)


@dataclass
class Finished:
    """What is known of a finished training, without its tensors.

    Attributes:
        key: digest of all that decided it.
        settings: all that decided it.
        branch: name of what was trained.
        level: of pruning.
        seed: of the initialisation.
        density: fraction of the prunable weights that the ticket of this level keeps.
        layers: fraction that this training kept of each layer.
        values: by name, as `evaluate` gave them.
        log: (step, values) as the training function logged them.
        steps: steps in all.
        seconds: of the training, or its share of a batch of trainings.
        notes: for the reader.
    """

    key: str
    settings: dict[str, Any]
    branch: str
    level: int
    seed: int
    density: float
    layers: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    log: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def early_stop(self) -> int | None:
        """The step of the lowest `loss` that was logged."""
        losses = [(values["loss"], step) for step, values in self.log if "loss" in values]
        return min(losses)[1] if losses else None


@dataclass(frozen=True)
class Experiment:
    """Which trainings of a folder belong together.

    Attributes:
        name: for the reader.
        about: what it does, as plain data.
        keys: of its trainings, in order, finished or not.
    """

    name: str
    about: dict[str, Any]
    keys: list[str]


class Store:
    """A folder of finished trainings.

        <first two of the key>/<key>/training.json      settings, values, log
                                     weights.safetensors  what training came to, buffers too
                                     masks.safetensors    one bit a weight
                                     state.safetensors    optimizer and random state, where training goes on
        index.sqlite                                     a row of each, made anew from the folders if lost
        experiments/                                     which of them belong together
        paths/                                           errors between two trainings
        partial/                                         trainings on their way

    A training is written under another name and renamed when it is whole: one that is there is finished.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise ArtifactError(f"{self.folder} is a file: choose a folder for the trainings.")
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """The folder of a training, finished or not."""
        return self.folder / key[:2] / key

    def partial(self, key: str) -> Path:
        """The file in which an unfinished training is kept."""
        return self.folder / "partial" / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a training is finished."""
        return (self.path(key) / _JOB).is_file()

    def put(
        self,
        finished: Finished,
        weights: Mapping[str, Tensor] | None,
        masks: Masks | None,
        state: State | None = None,
    ) -> None:
        """Keep a finished training; one that is there already stays as it is."""
        place = self.path(finished.key)
        if not self.has(finished.key):
            place.parent.mkdir(parents=True, exist_ok=True)
            new = Path(tempfile.mkdtemp(dir=place.parent, prefix=".new-"))
            try:
                if weights is not None:
                    save_file({n: _plain(t) for n, t in weights.items()}, new / _WEIGHTS)
                    sync(new / _WEIGHTS)
                if masks is not None:
                    masks.save(new / _MASKS)
                if state is not None:
                    state.save(new / _STATE)
                write_text(new / _JOB, json.dumps(asdict(finished), indent=1) + "\n")
                sync(new)
                try:
                    os.rename(new, place)
                except OSError:  # another process was faster, or the rest of something lies there
                    if not self.has(finished.key):
                        shutil.rmtree(place)
                        os.rename(new, place)
                sync(place.parent)
            finally:
                shutil.rmtree(new, ignore_errors=True)
                _sweep(place.parent)
        self.partial(finished.key).unlink(missing_ok=True)
        self._enter(finished)

    def get(self, key: str) -> Finished:
        """What is known of a finished training; `ArtifactError` if there is none, or it is damaged."""
        path = self.path(key) / _JOB
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            log = [(int(step), dict(values)) for step, values in data.pop("log")]
            return Finished(**data, log=log)
        except FileNotFoundError:
            raise ArtifactError(f"{self.folder} holds no training {key[:12]}.") from None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error}): remove its folder, and the training is repeated."
            ) from None

    def weights(self, key: str) -> dict[str, Tensor]:
        """What a training came to."""
        path = self.path(key) / _WEIGHTS
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}): remove its folder, and the training is repeated."
            ) from None

    def masks(self, key: str) -> Masks:
        """What a training kept."""
        return Masks.load(self.path(key) / _MASKS)

    def state(self, key: str) -> State:
        """The state that training goes on from."""
        return State.load(self.path(key) / _STATE)

    def put_experiment(self, experiment: Experiment) -> None:
        """Note what belongs together; once for each set of trainings."""
        text = json.dumps(asdict(experiment), indent=1) + "\n"
        place = self.folder / "experiments" / f"{sha256(text.encode()).hexdigest()[:16]}.json"
        if not place.is_file():
            write_text(place, text)

    def experiments(self) -> list[Experiment]:
        """The experiments of a folder, the oldest first."""
        found = []
        files = self.folder.glob("experiments/*.json")
        for path in sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                found.append(Experiment(str(data["name"]), dict(data["about"]), list(data["keys"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path} is damaged ({error}): remove it, and run again.") from None
        return found

    def all(self) -> list[Finished]:
        """All finished trainings, by the index, which is completed where folders are missing in it."""
        folders = {path.parent.name for path in self.folder.glob(f"??/*/{_JOB}")}
        with self._index() as index:
            known = {row[0] for row in index.execute("SELECT key FROM trainings")}
            index.executemany("DELETE FROM trainings WHERE key = ?", [(k,) for k in known - folders])
        for key in folders - known:
            self._enter(self.get(key))
        with self._index() as index:
            order = "SELECT key FROM trainings ORDER BY branch, level, seed, key"
            return [self.get(row[0]) for row in index.execute(order).fetchall()]

    def _enter(self, finished: Finished) -> None:
        row = (
            *(finished.key, finished.branch, finished.level, finished.seed, finished.density),
            *(json.dumps(finished.values), finished.steps, finished.seconds),
        )
        with self._index() as index:
            index.execute("INSERT OR REPLACE INTO trainings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / _INDEX
        try:
            connection = sqlite3.connect(path, timeout=60)
            with connection:
                connection.execute(_TABLE)
        except sqlite3.DatabaseError:  # the folders say it all: begin a new one
            path.unlink(missing_ok=True)
            connection = sqlite3.connect(path, timeout=60)
            with connection:
                connection.execute(_TABLE)
        try:
            with connection:
                yield connection
        finally:
            connection.close()


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for left in folder.glob(".new-*"):
        with suppress(OSError):  # another process may do the same
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)


def _plain(tensor: Tensor) -> Tensor:
    """A copy in row-major order, which files have: channels last, for one, is another."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
