"""Pruning while training: methods at equal epochs, three seeds, beside dense and random.

    python -m benchmarks.training [--nets LeNet-5] [--sparsities 0.8 0.9] [--methods ...] [--seeds 0] [--dev]

All start from the same dense weights (those of `benchmarks.realdata`; VGG-16 is trained here first) and train
for the same epochs with SGD, one cosine of the learning rate (one in each round, for rounds). Accuracy on all
test images once, at the end; nothing is chosen by it. `--dev` leaves a tenth of the training images out and
measures there instead: learning rates are chosen so (`--rate`). Seeds: order of the data and augmentation. A
finished cell is kept in `results/training.jsonl` and not run again; the table is `results/training.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.loop import Fit
from benchmarks.training.methods import METHODS
from benchmarks.training.nets import CACHE, NETS, Net

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILE, TABLE = RESULTS / "training.jsonl", RESULTS / "training.md"
EXPLANATION = [
    "## Why this is not the published order",
    "",
    "Published comparisons train for tens or hundreds of epochs, here it is one or two. Pruned at once,",
    "the weights that stay have all of them to make up for those that went; a method that removes on the",
    "way (gradually, in rounds, after a penalty) leaves a part of them to its final masks, at a lower",
    "learning rate, and RigL spends most of them on connections that start from zero. That costs more",
    "than it gains as long as the network bears the cut, and is made up for where it does not: compare",
    "the columns from left to right.",
]
KEY = ("part", "net", "method", "sparsity", "seed", "epochs", "rate")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--rate", type=float, help="another learning rate; with --dev only")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.rate and not arguments.dev:
        parser.error("--rate needs --dev: rates are not chosen on test images")
    part = "dev" if arguments.dev else "test"
    done = {tuple(r[k] for k in KEY) for r in rows()}
    for name in arguments.nets:
        net = NETS[name] if arguments.rate is None else replace(NETS[name], rate=arguments.rate)
        cells = [
            (part, name, method, sparsity, seed, net.epochs, net.rate)
            for seed in arguments.seeds
            for method in arguments.methods
            for sparsity in ([0.0] if method == "dense" else arguments.sparsities)
        ]
        cells = [cell for cell in cells if cell not in done]
        if cells:
            check_start(part, name, net)
        for cell in cells:
            _, _, method, sparsity, seed, *_ = cell
            write(dict(zip(KEY, cell, strict=True)) | run(net, method, sparsity, seed, part == "dev"))
    write_table()


def run(net: Net, method: str, sparsity: float, seed: int, dev: bool) -> dict[str, Any]:
    """One cell."""
    model, fit = net.dense(), Fit(net, seed, dev)
    before = fit.accuracy(model)
    torch.manual_seed(seed)
    started = time.perf_counter()
    masks = METHODS[method](model, sparsity, fit)
    seconds = time.perf_counter() - started
    if method != "dense":
        masks.check(model)
    return {
        "accuracy": fit.accuracy(model),
        "start": before,
        "removed": masks.sparsity,
        "emptiest": max(masks.by_layer().values()),
        "seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def check_start(part: str, name: str, net: Net) -> None:
    """Refuse cells from other dense weights than those of the cells that they would stand beside.

    Networks that are trained here differ from machine to machine; those that are read, by rounding only.
    """
    found = {r["start"] for r in rows() if r["part"] == part and r["net"] == name}
    start = Fit(net, 0, part == "dev").accuracy(net.dense()) if found else 0.0
    if any(abs(start - other) > 5e-4 for other in found):
        raise SystemExit(
            f"{name}: the dense weights here have an accuracy of {start}, those of finished cells {found}: "
            f"bring their file to {CACHE}, or delete their rows in {FILE.name} to begin anew."
        )


def rows() -> list[dict[str, Any]]:
    """All finished cells."""
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def write(row: dict[str, Any]) -> None:
    """Keep a finished cell."""
    with FILE.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    print({k: row[k] for k in (*KEY, "accuracy", "seconds")}, flush=True)


def write_table() -> None:
    """Mean and range over seeds, as Markdown."""
    found = [r for r in rows() if r["part"] == "test"]
    lines = [
        "# Pruning while training",
        "",
        "Written by `python -m benchmarks.training`. Test accuracy in per cent, mean over seeds (lowest to "
        "highest; number of seeds). All start from the same dense weights and train for the same epochs.",
    ]
    for name in NETS:
        mine = [r for r in found if r["net"] == name]
        if not mine:
            continue
        sparsities = sorted({r["sparsity"] for r in mine if r["method"] != "dense"})
        start = 100 * mine[0]["start"]
        lines += ["", f"## {name}, {mine[0]['epochs']} epochs, dense at the start {start:.2f}", ""]
        lines += ["| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |"]
        lines += ["| --- |" + " ---: |" * len(sparsities)]
        for method in METHODS:
            cells = []
            for s in sparsities:
                at = [r for r in mine if r["method"] == method and r["sparsity"] in (s, 0.0)]
                values = [100 * r["accuracy"] for r in at]
                if not values:
                    cells.append("—")
                    continue
                spread = f"{min(values):.2f} to {max(values):.2f}; {len(values)}"
                cells.append(f"{statistics.fmean(values):.2f} ({spread})")
            if any(cell != "—" for cell in cells):
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", *EXPLANATION]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
