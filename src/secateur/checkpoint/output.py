"""The folder that a run fills: shards overwritten in place, masks, a journal; visible at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from secateur.artifacts.folder import _earlier, _exchange, refuse_foreign
from secateur.artifacts.hf_folder import CONFIG, GENERATION
from secateur.artifacts.manifest import MASKS, NAME, Manifest, fingerprints, read_json
from secateur.artifacts.mask_file import MaskFile
from secateur.artifacts.parts import refusing, sync
from secateur.artifacts.saving import REPORT, companions, write_report
from secateur.artifacts.shards import Shards
from secateur.artifacts.tensors import ties
from secateur.checkpoint.journal import Journal
from secateur.checkpoint.source import Source
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.core.names import Target
from secateur.record import Report
from secateur.stream import ranks

_RUN = ".secateur-run"
_EXCHANGE = "exchange.json"  # the files of `out` that leave, from when the first of them may have left


class Output:
    """Where a pruned checkpoint comes to be: a folder inside `out`, written by the first process alone.

    Raises `ArtifactError` if `out` holds something else than an artifact or an unfinished run.
    """

    def __init__(self, out: Path, source: Source) -> None:
        self.out, self.source = out, source
        self.targets: dict[str, Target] = {}  # set before a run is started
        self.folder = out / _RUN
        if not (self.folder / _EXCHANGE).is_file():  # else `out` may hold a part of the result
            refuse_foreign(out)
        self.states = self.folder / "states"
        self._shards: Shards | None = None
        self._masks: MaskFile | None = None

    def journal(self, key: str) -> Journal | None:
        """That of a run that was killed, if there is one."""
        return Journal.read(self.folder, key)

    def start(self) -> None:
        """Lay out the files of a new run: copies of the source's, and masks."""
        if ranks.rank() == 0:
            with refusing(f"{self.folder} cannot be made"):
                shutil.rmtree(self.folder, ignore_errors=True)
                refuse_foreign(self.out)
                self.folder.mkdir(parents=True)
                sync(self.out)
        ranks.wait()
        self._open(resume=False)

    def resume(self) -> None:
        """Take up the files of the run that was killed.

        Raises `ArtifactError` if one is gone or cut short: what was written to it would be missing.
        """
        for name in (*self.source.shards.files, MASKS):
            path, size = self.folder / name, None
            if name != MASKS:
                size = (self.source.folder / name).stat().st_size
            if not path.is_file() or size not in (None, path.stat().st_size):
                raise ArtifactError(f"{path} is gone or cut short: remove {self.folder} to begin anew.")
        self._open(resume=True)

    def keep(self, journal: Journal) -> None:
        """Put on the disk that a block is finished; all it needs is there already."""
        ranks.wait()
        if ranks.rank() == 0:
            with refusing(f"{self.folder} cannot be written"):
                sync(self.folder)  # the names of the files that the journal relies on
                journal.write(self.folder)
                sync(self.folder)  # its own name, before anything is removed that an older one relies on
        ranks.wait()

    def write(self, done: Mapping[str, Tensor]) -> None:
        """The weights of layers, as they are in the model, and their masks `[out, in]`."""
        if self._shards is None or self._masks is None:
            return
        for name, keep in done.items():
            t = self.targets[name]
            self.source.pieces[name].write(self._shards, t.weight.detach())
            self._masks.write(name, t.layout.restore(keep.cpu(), t.weight.shape))
        self._shards.flush()
        sync(self.folder / MASKS)

    def finish(self, report: Report) -> None:
        """Exchange what `out` held for the result; all of it again if a run was killed meanwhile."""
        ranks.wait()
        if ranks.rank() == 0:
            with refusing(f"{self.out} cannot be written"):
                new, old = self.folder / "new", self.folder / "old"
                for path in (new, old):
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir()
                self._gather(report, new)
                _exchange(self.out, new, old, self._leaving())
                sync(self.out)
                self._remove()
        ranks.wait()

    def _gather(self, report: Report, new: Path) -> None:
        """All files of the result."""
        assert self._shards is not None and self._masks is not None
        self._masks.finish()
        for name in (*self._shards.files, MASKS):
            # A link: a run that is killed now finds its own files again.
            _link(self.folder / name, new / name)
        for name in (CONFIG, GENERATION):
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, new / name)
        for path in companions(self.source.folder):
            shutil.copyfile(path, new / path.name)
        write_report(report, new)
        kind = type(self.source.model)
        Manifest(
            "hf",
            f"{kind.__module__}.{kind.__qualname__}",
            fingerprints(new.iterdir()),
            ties(self.source.model),
            self._dtypes(),
            dict(report.settings),
        ).write(new)

    def _leaving(self) -> list[str]:
        """The files of an earlier artifact, noted before the first of them leaves."""
        path = self.folder / _EXCHANGE
        begun = path.is_file()
        names = read_json(path)["leaving"] if begun else []
        if not begun or (self.out / NAME).is_file():
            names = list(dict.fromkeys([*_earlier(self.out), *names]))
        write_text(path, json.dumps({"leaving": names}))
        sync(self.folder)
        return names

    def _remove(self) -> None:
        """The folder of the run; the journal first, since what is left of the others is no run any more."""
        Journal.remove(self.folder)
        sync(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, resume: bool) -> None:
        if ranks.rank() != 0:
            return
        self._shards = self.source.shards.copy_files(self.folder, resume=resume)
        path = self.folder / MASKS
        shapes = {name: tuple(t.weight.shape) for name, t in self.targets.items()}
        self._masks = MaskFile.open(path) if path.is_file() and resume else MaskFile.create(path, shapes)

    def _dtypes(self) -> dict[str, str]:
        """As `artifacts.hf.float_dtypes`, of the types in the files."""
        found = {
            name: str(self.source.dtype_of(name)).removeprefix("torch.")
            for name in self.source.pieces
            if self.source.dtype_of(name).is_floating_point
        }
        kinds = list(found.values())
        common = max(sorted(set(kinds)), key=kinds.count)
        return {"*": common} | {name: kind for name, kind in found.items() if kind != common}


def amend(folder: Path, report: Report) -> None:
    """Replace the report of an artifact by one with more notes."""
    manifest = Manifest.read(folder)
    files = {name: file for name, file in manifest.files.items() if name != REPORT}
    replace(manifest, files=files).write(folder)  # killed behind this, the folder is still sound
    write_report(report, folder)
    files |= fingerprints([folder / REPORT])
    replace(manifest, files=files).write(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
