"""A folder that is written wholly or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.artifacts.manifest import NAME, Manifest
from secateur.core.errors import ArtifactError
from secateur.core.files import sync

_PREFIX = ".secateur-"


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder; on leaving, its files replace the artifact in `folder`, `secateur.json` last.

    Files of the earlier artifact that are not written again are removed, files that are not its own are left
    alone. On an error everything is as before.

    Raises `ArtifactError` if `folder` holds something else than an artifact.
    """
    earlier = _earlier(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Inside, not beside: `folder` may be a mount point, and renaming works only within a file system.
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_PREFIX))
    try:
        incoming, outgoing = temporary / "new", temporary / "old"
        incoming.mkdir()
        outgoing.mkdir()
        yield incoming
        _exchange(folder, incoming, outgoing, earlier)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def refuse_foreign(folder: Path) -> None:
    """Raise `ArtifactError` if a folder holds something that `written_at_once` would not replace."""
    _earlier(folder)


def _earlier(folder: Path) -> list[str]:
    """Names of the files of the artifact that will be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file: choose a folder to save into.")
    if not folder.exists():
        return []
    if (folder / NAME).is_file():
        return [NAME, *Manifest.read(folder).files]
    # What a killed process left behind is no reason to refuse.
    if any(not path.name.startswith(_PREFIX) for path in folder.iterdir()):
        raise ArtifactError(
            f"{folder} is not empty and holds no {NAME}, so it is not overwritten: choose another folder."
        )
    return []


def _exchange(folder: Path, incoming: Path, outgoing: Path, earlier: list[str]) -> None:
    arriving = sorted((path.name for path in incoming.iterdir()), key=lambda name: (name == NAME, name))
    # safetensors writes files that only their owner reads; the manifest has the mode of any new file.
    mode = (incoming / NAME).stat().st_mode
    for name in arriving:
        (incoming / name).chmod(mode)
        sync(incoming / name)
    leaving = [name for name in dict.fromkeys([*earlier, *arriving]) if (folder / name).exists()]
    moves = [(folder / name, outgoing / name) for name in leaving]
    moves += [(incoming / name, folder / name) for name in arriving]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise
