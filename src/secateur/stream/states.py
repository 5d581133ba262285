"""Hidden states between two blocks, for all batches: in memory, beyond a limit in files, always as put."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from secateur.core.errors import StatsError
from secateur.core.files import sync

_GB = 1 << 30
_ANEW = "remove the folder .secateur-run above it to begin anew"


class States:
    """What blocks returned, by block and batch: trees of tensors.

    Args:
        folder: where every state is written as well, so that a run can be resumed from them; None keeps all
            in memory.
        limit: bytes that are kept in memory beside the files.
    """

    def __init__(self, folder: Path | None = None, limit: int = 4 * _GB) -> None:
        self._folder, self._limit = folder, limit
        self._trees: dict[tuple[int, int], Any] = {}
        self._bytes = 0
        self.slots: dict[int, set[int]] = {}  # by block, the batches that are there
        self.peak = 0  # bytes in memory at most
        self._stale: list[Path] = []
        if folder is not None:
            with _told(f"{folder} cannot be made"):
                folder.mkdir(parents=True, exist_ok=True)

    def put(self, slot: int, i: int, tree: Any) -> None:
        """Keep a copy of what block `slot` returned for batch `i`."""
        self.slots.setdefault(slot, set()).add(i)
        if self._folder is not None:
            _write(self._path(slot, i), tree)
        size = _size(tree)
        if self._folder is None or self._bytes + size <= self._limit:
            self._trees[slot, i] = copied(tree)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def get(self, slot: int, i: int) -> Any:
        """The tree; not a copy where it is kept in memory."""
        if (slot, i) in self._trees:
            return self._trees[slot, i]
        return _read(self._path(slot, i))

    def drop(self, slot: int) -> None:
        """Forget a block; its files stay until `settle`."""
        for i in self.slots.pop(slot, ()):
            tree = self._trees.pop((slot, i), None)
            self._bytes -= _size(tree)
            if self._folder is not None:
                self._stale.append(self._path(slot, i))

    def flush(self) -> None:
        """Wait until the names of the files, too, are on the disk, before a journal relies on them."""
        if self._folder is not None:
            with _told(f"{self._folder} cannot be written"):
                sync(self._folder)

    def settle(self) -> None:
        """Remove the files of what was dropped, once a journal says that it is not needed any more."""
        for path in self._stale:
            path.unlink(missing_ok=True)
        self._stale.clear()

    def resume(self, slots: set[int], batches: int) -> None:
        """Take up the files of an earlier run, those of `slots`; all others are removed.

        Raises `StatsError` if one is missing.
        """
        assert self._folder is not None
        wanted = {self._path(slot, i): (slot, i) for slot in slots for i in range(batches)}
        for path in self._folder.iterdir():
            if path not in wanted:
                path.unlink()
        for path, (slot, i) in wanted.items():
            if not path.is_file():
                raise StatsError(f"{path} is missing: {_ANEW}.")
            self.slots.setdefault(slot, set()).add(i)

    def _path(self, slot: int, i: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{slot:05d}-{i:06d}.safetensors"


def copied(tree: Any) -> Any:
    """The tree with every tensor copied."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


def _size(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _write(path: Path, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_plain(tree, tensors))
    with _told(f"{path} cannot be written"):
        save_file(tensors, path, {"tree": shape})
        sync(path)  # before the journal says that the block is done


def _read(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118, no mapping
            return _tree(json.loads(f.metadata()["tree"]), tensors)
    except (OSError, SafetensorError) as error:
        raise StatsError(f"{path} cannot be read ({error}): {_ANEW}.") from None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Make `StatsError` of an error of the operating system, which the safetensors library wraps."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StatsError(f"{what} ({error}): free space on its disk, then run this again.") from None


def _plain(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; its tensors are entered into `tensors`."""
    if isinstance(tree, Tensor):
        tensors[str(len(tensors))] = tree.detach().cpu().contiguous().clone()
        return {"tensor": str(len(tensors) - 1), "device": str(tree.device)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_plain(x, tensors) for x in tree]}
    if type(tree) is dict and all(isinstance(k, str) for k in tree):
        return {"dict": {k: _plain(x, tensors) for k, x in tree.items()}}
    raise StatsError(
        f"A block returns a {type(tree).__name__}, which cannot be kept in a file: prune the model in memory."
    )


def _tree(plain: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, value), *_) = plain.items()
    if kind == "tensor":
        return tensors[value].to(plain["device"])
    if kind == "value":
        return value
    if kind == "dict":
        return {k: _tree(x, tensors) for k, x in value.items()}
    parts: Iterator[Any] = (_tree(x, tensors) for x in value)
    return tuple(parts) if kind == "tuple" else list(parts)
