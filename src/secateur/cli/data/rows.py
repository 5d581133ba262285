"""What a file of texts holds, row by row: texts or token ids, and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError

Row = str | list[int] | None  # None where a table has nothing
TEXT, IDS, LABEL = "text", "input_ids", "label"


@dataclass(frozen=True)
class Rows:
    """Rows of a file, all texts or all lists of token ids.

    Attributes:
        name: of the file, as messages call it.
        items: read when they are asked for, where the file can be larger than memory.
        are_ids: whether they are token ids.
        labels: of a classification, one for each row; None without.
    """

    name: str
    items: Sequence[Row]
    are_ids: bool = False
    labels: Sequence[int] | None = None


def read_rows(file: Path) -> Rows:
    """A text, a JSON list, or a JSON object in each line."""
    found = _parsed(file)
    if not isinstance(found, list) or not found:
        raise SecateurError(f"{file} must hold a list of texts or of lists of token ids.")
    items = [_content(row) for row in found]
    are_ids = all(isinstance(item, list) for item in items)
    if not are_ids and not all(isinstance(item, str) for item in items):
        raise SecateurError(
            f"{file} must hold texts, or objects with a '{TEXT}', or in every row token ids, as a list or "
            f"under '{IDS}'."
        )
    if (bad := next((i for i, item in enumerate(items, 1) if not _is_content(item)), None)) is not None:
        what = "a list of token ids" if are_ids else "a text that is not empty"
        raise SecateurError(f"{file}: row {bad} is not {what}.")
    labels = [row[LABEL] for row in found if isinstance(row, dict) and isinstance(row.get(LABEL), int)]
    return Rows(str(file), items, are_ids, labels if len(labels) == len(found) else None)


def _parsed(file: Path) -> Any:
    try:
        raw = file.read_text(encoding="utf-8")
        if not raw.strip():
            raise SecateurError(f"{file} is empty.")
        if file.suffix == ".json":
            return json.loads(raw)
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in raw.splitlines() if line.strip()]
        return [raw]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SecateurError(f"{file} cannot be read as {file.suffix or 'text'}: {error}.") from None


def _content(row: Any) -> Any:
    return row.get(TEXT, row.get(IDS)) if isinstance(row, dict) else row


def _is_content(item: Any) -> bool:
    if isinstance(item, str):
        return bool(item.strip())
    return bool(item) and all(type(i) is int for i in item)
