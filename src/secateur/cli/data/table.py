"""A column of a table, through the `datasets` library. Only data is read: no script, no network."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from secateur.artifacts.tensors import first_line
from secateur.cli.data.rows import IDS, LABEL, TEXT, Rows
from secateur.core.errors import SecateurError

_READERS = {".parquet": "from_parquet", ".csv": "from_csv", ".arrow": "from_file"}


def is_table(path: Path) -> bool:
    """Whether `read_table` is for it."""
    return path.is_dir() or path.suffix in _READERS


def read_table(path: Path, column: str | None) -> Rows:
    """The texts or token ids of a column, "text" or else "input_ids" if none is given."""
    table = _open(path)
    names = table.column_names
    if column is None:
        column = next((name for name in (TEXT, IDS) if name in names), None)
    if column not in names:
        raise SecateurError(
            f"{path} has {f'no column {column}' if column else f'neither a column {TEXT} nor {IDS}'}: "
            f"say which to read, {path}:COLUMN, one of {', '.join(names)}."
        )
    if not len(table):
        raise SecateurError(f"{path} is empty.")
    kind = table.features[column]
    are_ids = _is(getattr(kind, "feature", None), "int", "uint")
    if not are_ids and not _is(kind, "string", "large_string"):
        raise SecateurError(
            f"The column {column} of {path} holds neither texts nor lists of token ids: {kind}."
        )
    labels = list(table[LABEL]) if LABEL in names and _is(table.features[LABEL], "int", "uint") else None
    if labels is not None and None in labels:
        labels = None
    return Rows(f"{path}:{column}", table[column], are_ids, labels)


def _open(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise SecateurError(
            f"Reading {path} takes the package datasets: pip install 'secateur[data]'."
        ) from None
    try:
        with _without_bars(datasets):
            table = datasets.load_from_disk(str(path)) if path.is_dir() else _read(datasets.Dataset, path)
    except Exception as error:  # of pyarrow, pandas, fsspec and datasets, with no common base
        what = "a data set that save_to_disk wrote" if path.is_dir() else f"{path.suffix[1:]}"
        raise SecateurError(
            f"{path} cannot be read as {what}: {first_line(error.__cause__ or error)}"
        ) from None
    if not isinstance(table, datasets.Dataset):
        raise SecateurError(
            f"{path} holds several splits: give one of {', '.join(map(str, _parts(path, table)))}."
        )
    return table.with_format(None)


def _read(dataset: Any, path: Path) -> Any:
    if path.suffix == ".arrow":
        return dataset.from_file(str(path))
    with TemporaryDirectory() as cache:  # which nobody would clean up in the user's home
        read = getattr(dataset, _READERS[path.suffix])
        return read(glob.escape(str(path)), cache_dir=cache, keep_in_memory=True)


def _parts(path: Path, splits: Any) -> list[Path]:
    return [path / str(name) for name in splits]


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _is(feature: Any, *dtypes: str) -> bool:
    """Whether a feature is of a type: by its name, or by the name without its width."""
    dtype = getattr(feature, "dtype", None)
    return isinstance(dtype, str) and dtype.rstrip("0123456789") in dtypes
