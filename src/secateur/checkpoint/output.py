"""The folder that a run fills: shards overwritten in place, masks, a journal; visible at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from secateur.artifacts.folder import refuse_foreign, written_at_once
from secateur.artifacts.hf_folder import CONFIG, GENERATION
from secateur.artifacts.manifest import MASKS, Manifest, fingerprints
from secateur.artifacts.mask_file import MaskFile
from secateur.artifacts.parts import sync
from secateur.artifacts.saving import companions, write_report
from secateur.artifacts.shards import Shards
from secateur.artifacts.tensors import ties
from secateur.checkpoint.journal import Journal
from secateur.checkpoint.source import Source
from secateur.core.names import Target
from secateur.record import Report
from secateur.stream import ranks

_RUN = ".secateur-run"


class Output:
    """Where a pruned checkpoint comes to be: a folder inside `out`, written by the first process alone.

    Raises `ArtifactError` if `out` holds something else than an artifact or an unfinished run.
    """

    def __init__(self, out: Path, source: Source) -> None:
        refuse_foreign(out)
        self.out, self.source = out, source
        self.targets: dict[str, Target] = {}  # set before a run is started
        self.folder = out / _RUN
        self.states = self.folder / "states"
        self._shards: Shards | None = None
        self._masks: MaskFile | None = None

    def journal(self, key: str) -> Journal | None:
        """That of a run that was killed, if there is one."""
        return Journal.read(self.folder, key)

    def start(self) -> None:
        """Lay out the files of a new run: copies of the source's, and masks."""
        if ranks.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        ranks.wait()
        self._open(resume=False)

    def resume(self) -> None:
        """Take up the files of the run that was killed."""
        self._open(resume=True)

    def keep(self, journal: Journal) -> None:
        """Put on the disk that a block is finished; all it needs is there already."""
        ranks.wait()
        if ranks.rank() == 0:
            journal.write(self.folder)
        ranks.wait()

    def write(self, done: Mapping[str, Tensor]) -> None:
        """The weights of layers, as they are in the model, and their masks `[out, in]`."""
        if self._shards is None or self._masks is None:
            return
        for name, keep in done.items():
            t = self.targets[name]
            key = self.source.keys[name]
            self._shards.write(key, t.weight.detach().to(self._shards.entry(key).dtype))
            self._masks.write(name, t.layout.restore(keep.cpu(), t.weight.shape))
        self._shards.flush()
        sync(self.folder / MASKS)

    def finish(self, report: Report) -> None:
        """Exchange what `out` held for the result."""
        ranks.wait()
        if ranks.rank() == 0 and self._shards is not None and self._masks is not None:
            self._masks.finish()
            with written_at_once(self.out) as new:
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
            shutil.rmtree(self.folder, ignore_errors=True)
        ranks.wait()

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
            name: str(self.source.shards.entry(key).dtype).removeprefix("torch.")
            for name, key in self.source.keys.items()
            if self.source.shards.entry(key).dtype.is_floating_point
        }
        kinds = list(found.values())
        common = max(sorted(set(kinds)), key=kinds.count)
        return {"*": common} | {name: kind for name, kind in found.items() if kind != common}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
