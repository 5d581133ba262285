"""One-shot pruning of real models without retraining: criteria x allocations x sparsities.

    python -m benchmarks.oneshot_criteria [resnet20 lenet300 lenet5 minilm] [--seeds 3]

Each cell prunes a fresh copy of the pretrained model and measures it on test data. A seed chooses the random
scores, the probes, and the third of the calibration data (training data, never test) that is used; criteria
on weights alone run once. Cells are appended to `benchmarks/results/oneshot_criteria.jsonl` as they finish;
a rerun computes only what is missing; the tables are written to `benchmarks/results/oneshot_criteria.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from benchmarks import realdata

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
PROBES = 4


@dataclass(frozen=True)
class Case:
    """A pretrained model, its calibration data and its test metric."""

    make: Callable[[], nn.Module]
    data: Any
    examples: int
    loss: Callable[..., torch.Tensor]
    metric: Callable[[nn.Module], float]
    what: str
    batchnorm: bool = False
    allocations: tuple[str, ...] = ("uniform", "global_", "erk", "lamp")

    def batches(self, seed: int, seeds: int) -> list[Any]:
        """The calibration batches of one seed."""
        return realdata.calibration(self.data, self.examples * seeds, 32)[seed::seeds]


def _images(data: Callable[..., Any], n: int | None) -> Callable[[nn.Module], float]:
    def metric(model: nn.Module) -> float:
        images, labels = data("test", n)
        return realdata.accuracy(model, images, labels)

    return metric


CASES = {
    "lenet300": Case(
        realdata.lenet300, "fashion_mnist", 512, F.cross_entropy, _images(realdata.fashion_mnist, None),
        "LeNet-300-100, Fashion-MNIST, accuracy on the 10,000 test images",
    ),
    "lenet5": Case(
        realdata.lenet5, "fashion_mnist", 512, F.cross_entropy, _images(realdata.fashion_mnist, None),
        "LeNet-5, Fashion-MNIST, accuracy on the 10,000 test images",
        allocations=("uniform", "global_", "lamp"),
    ),
    "resnet20": Case(
        realdata.resnet20, "cifar10", 512, F.cross_entropy, _images(realdata.cifar10, 2000),
        "ResNet-20, CIFAR-10 (JPEG), accuracy on the first 2,000 test images", True,
        ("uniform", "global_", "lamp"),
    ),
    "minilm": Case(
        lambda: realdata.StsModel(realdata.minilm()), "stsb", 192, realdata.sts_loss,
        lambda model: realdata.sts_spearman(model, "test", 300),
        "MiniLM-L6, STS-b, Spearman correlation on 300 test pairs",
        allocations=("uniform", "global_"),
    ),
}  # fmt: skip

ON_WEIGHTS: dict[str, sc.Criterion] = {"magnitude": sc.Magnitude(), "synflow": sc.SynFlow()}
ALLOCATIONS: dict[str, sc.Allocation] = {
    "uniform": sc.uniform,
    "global_": sc.global_,
    "erk": sc.erk,
    "lamp": sc.lamp,
    "threshold": sc.threshold,
}


def seeded(seed: int) -> dict[str, sc.Criterion]:
    """Criteria whose result depends on a seed or on the calibration sample."""
    return {
        "random": sc.Random(seed),
        "taylor": sc.Taylor(),
        "taylor-squared": sc.TaylorSquared(),
        "obd-fisher": sc.OBD(),
        "obd-hutchinson": sc.OBD(sc.HutchinsonDiagonal(PROBES, seed)),
        "snip": sc.SNIP(),
        "grasp": sc.GraSP(),
        "wanda": sc.Wanda(),
        "ria": sc.RIA(),
    }


@dataclass(frozen=True)
class Cell:
    """One run."""

    case: str
    criterion: str
    allocation: str
    pattern: str
    sparsity: float
    seed: int | None


def cells(case: str, criterion: str, seed: int | None) -> Iterator[Cell]:
    """The allocations, patterns and sparsities at which one criterion is run."""
    allocations = list(ALLOCATIONS) if criterion == "magnitude" else CASES[case].allocations
    for sparsity in SPARSITIES:
        for allocation in allocations:
            yield Cell(case, criterion, allocation, "unstructured", sparsity, seed)
        if criterion in ("wanda", "ria", "magnitude"):
            yield Cell(case, criterion, "uniform", "row", sparsity, seed)


def run(case_name: str, seeds: int, done: dict[Cell, Any], out: Path) -> None:
    """Every missing cell of one model."""
    case = CASES[case_name]
    dense = case.make()
    if Cell(case_name, "dense", "-", "-", 0.0, None) not in done:
        _write(out, Cell(case_name, "dense", "-", "-", 0.0, None), case.metric(dense), 0.0)
    for name, criterion in ON_WEIGHTS.items():
        batches = case.batches(0, seeds)[:1]
        for cell in cells(case_name, name, None):
            if cell not in done:
                _run_cell(cell, dense, case, criterion, out, batches=batches)
    for seed in range(seeds):
        criteria = seeded(seed)
        todo = [c for name in criteria for c in cells(case_name, name, seed) if c not in done]
        needs = [stat for name in {c.criterion for c in todo} for stat in criteria[name].needs]
        if not todo:
            continue
        stats = sc.collect(dense, needs, case.batches(seed, seeds), case.loss)
        for cell in todo:
            _run_cell(cell, dense, case, criteria[cell.criterion], out, stats=stats)


def _run_cell(
    cell: Cell, dense: nn.Module, case: Case, criterion: sc.Criterion, out: Path, **data: Any
) -> None:
    model = copy.deepcopy(dense)
    started = time.perf_counter()
    pattern = sc.PerRow() if cell.pattern == "row" else sc.Unstructured()
    try:
        report = sc.prune_(
            model, criterion, cell.sparsity, allocation=ALLOCATIONS[cell.allocation], pattern=pattern, **data
        )
    except sc.StatsError as error:
        _write(out, cell, None, 0.0, str(error))
        return
    assert report.removed == int(cell.sparsity * report.entries + 0.5)
    try:
        value = case.metric(model)
    except ValueError as error:  # a correlation of constants is undefined
        _write(out, cell, None, time.perf_counter() - started, str(error))
        return
    repaired = None
    if case.batchnorm:
        sc.reestimate_batchnorm_(model, realdata.calibration(case.data, 512, 128))
        repaired = case.metric(model)
    _write(out, cell, value, time.perf_counter() - started, repaired=repaired)


def _write(
    out: Path, cell: Cell, value: float | None, seconds: float, note: str = "", repaired: float | None = None
) -> None:
    row = {**cell.__dict__, "value": value, "repaired": repaired, "seconds": round(seconds, 2), "note": note}
    with out.open("a") as f:
        f.write(json.dumps(row) + "\n")
    print(cell, value, repaired, note, flush=True)


def read(out: Path, column: str = "value") -> dict[Cell, Any]:
    """Finished cells and their values."""
    if not out.exists():
        return {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    keys = Cell.__dataclass_fields__
    return {Cell(**{k: row[k] for k in keys}): row[column] for row in rows}


def tables(out: Path) -> str:
    """Markdown: a table for each model, mean and standard deviation over seeds."""
    lines = [
        "# One-shot pruning without retraining",
        "",
        "Written by `python -m benchmarks.oneshot_criteria`. Mean over seeds (± standard deviation where "
        "there is more than one); — where the metric is undefined or the criterion does not apply. "
        f"torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}.",
        "",
    ]
    values, repaired = read(out), read(out, "repaired")
    for name, case in CASES.items():
        lines += _table(case.what, {c: v for c, v in values.items() if c.case == name})
        if case.batchnorm:
            title = f"{case.what}, batch normalisation re-estimated on 512 training images after pruning"
            mine = {c: v for c, v in repaired.items() if c.case == name}
            lines += _table(
                title, mine | {c: v for c, v in values.items() if c in mine and c.criterion == "dense"}
            )
    return "\n".join(lines)


def _table(title: str, mine: dict[Cell, Any]) -> list[str]:
    if not mine:
        return []
    dense = next(v for c, v in mine.items() if c.criterion == "dense")
    lines = [f"## {title}", "", f"Dense: {dense:.4f}.", ""]
    lines += ["| criterion | allocation | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |"]
    lines += ["| --- | --- |" + " ---: |" * len(SPARSITIES)]
    rows = dict.fromkeys((c.criterion, c.allocation, c.pattern) for c in mine if c.criterion != "dense")
    for row in rows:
        texts = []
        for sparsity in SPARSITIES:
            cells = (
                c for c in mine if (c.criterion, c.allocation, c.pattern) == row and c.sparsity == sparsity
            )
            texts.append(_cell_text([mine[c] for c in cells if mine[c] is not None]))
        criterion, allocation, pattern = row
        where = allocation.rstrip("_") + (", per row" if pattern == "row" else "")
        lines.append(f"| {criterion} | {where} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _cell_text(values: list[float]) -> str:
    if not values:
        return "—"
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=[*CASES, []])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / "oneshot_criteria.jsonl"
    for case in arguments.cases or CASES:
        run(case, arguments.seeds, read(out), out)
    (RESULTS / "oneshot_criteria.md").write_text(tables(out))


if __name__ == "__main__":
    main()
