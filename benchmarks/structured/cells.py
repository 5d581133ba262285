"""Finished cells, one JSON object a line."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parents[1] / "results" / "structured.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run.

    Stages: "pruned" (every variant, validation data), "test" (the chosen ones before fine-tuning), "probe"
    (validation data after a few steps of fine-tuning), "tuned" (test data after fine-tuning).
    """

    task: str
    target: str
    method: str
    variant: str
    seed: int
    stage: str


def read(file: Path = FILE) -> dict[Cell, dict[str, Any]]:
    """Finished cells and their rows; of two rows for one cell the later counts."""
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {Cell(**{key: row[key] for key in Cell.__dataclass_fields__}): row for row in rows}


def write(cell: Cell, values: dict[str, Any], file: Path = FILE) -> None:
    """Append one row with what is needed to repeat it."""
    row = {**asdict(cell), **values, "command": command(), "versions": _versions(), "machine": _machine()}
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    print(*asdict(cell).values(), {k: v for k, v in values.items() if v != ""}, flush=True)


def command() -> str:
    return " ".join(["python -m benchmarks.structured", *sys.argv[1:]])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "torch-pruning", "transformers", "secateur"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    cores = os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} thread(s)"
