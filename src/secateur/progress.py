"""A progress bar on standard error, only where a person watches a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(
    items: Iterable[T], what: str | Callable[[], str], total: int | None = None, done: int = 0
) -> Iterator[T]:
    """Yield `items` while a bar shows how many are done, `done` of `total` before, and the time left.

    `what` is said beside the bar; a function is asked anew for each item.
    """
    said = what if callable(what) else lambda: what
    if total is None and hasattr(items, "__len__"):
        try:
            total = len(items)  # type: ignore[arg-type]
        except TypeError:  # a loader over a stream says it has no length
            total = None
    count = TextColumn("{task.completed}/{task.total}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched()) as bar:
        task = bar.add_task(said(), total=total, completed=done)
        for item in items:
            yield item
            bar.update(task, advance=1, description=said())


def watched() -> bool:
    """Whether standard error is a terminal, so that bars are shown."""
    return Console(stderr=True).is_terminal
