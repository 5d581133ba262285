"""Changes that can be taken back, the last first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Journal:
    """What was done to a model, and how to undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._replaced: list[tuple[Any, Any]] = []

    def done(self, undo: Callable[[], object]) -> None:
        """Remember how to take back what is about to be done."""
        self._undo.append(undo)

    def set_item(self, mapping: Any, key: Any, value: Any) -> None:
        """Change an entry of a dict or list."""
        old = mapping[key]
        self.done(lambda: mapping.__setitem__(key, old))
        mapping[key] = value
        self._replaced.append((old, value))

    def replaced(self) -> list[tuple[Any, Any]]:
        """Old and new values of the entries changed so far."""
        return list(self._replaced)

    def undo(self) -> None:
        """Take everything back."""
        while self._undo:
            self._undo.pop()()
