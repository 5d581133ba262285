"""Where the models and data lie, and how much of a data set to take."""

import os
from functools import cache
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "SECATEUR_DATA"
DEFAULT_ROOT = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def data_root() -> Path:
    """The folder of models and data: `$SECATEUR_DATA`, or `shared/data` beside the repository.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    root = Path(chosen) if chosen else DEFAULT_ROOT
    if not root.is_dir():
        state = f"set to {chosen!r}" if chosen else "not set"
        raise FileNotFoundError(
            f"No folder of real models and data at {root} ({ENVIRONMENT_VARIABLE} is {state}, the default is "
            f"{DEFAULT_ROOT}): set {ENVIRONMENT_VARIABLE} to the folder that holds cifar10_jpeg and the rest."
        )
    return root


@cache
def tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer stored in a folder of the data, shared between callers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_root() / folder)


def count(n: int | None, available: int, what: str) -> int:
    """The number of examples to take: n, or all that are available if n is None.

    Raises:
        ValueError: n is not in 1..available.
    """
    if n is None:
        return available
    if not 1 <= n <= available:
        raise ValueError(f"{what} has {available} examples: n must be between 1 and {available}, not {n}.")
    return n


def evenly(n: int | None, available: int, what: str) -> list[int]:
    """n positions spread evenly over a data set ordered by source, so that every source is represented."""
    taken = count(n, available, what)
    return [i * available // taken for i in range(taken)]
