"""Pruning at initialisation, what SNIP, GraSP and SynFlow are made for: prune, then train.

    python -m benchmarks.at_init [--seeds 3] [--epochs 5]

LeNet-300-100 on Fashion-MNIST. Every run starts from the same initialisation for its seed, is pruned by one
global ranking before the first step, and is trained alike with the masks held. Dense training and magnitude
pruning of the trained network (without retraining) are the references. Written to
`benchmarks/results/at_init.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from benchmarks import realdata
from benchmarks.probe import machine

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.9, 0.95, 0.98, 0.99)


def train(net: nn.Module, epochs: int, seed: int, masks: sc.Masks | None) -> nn.Module:
    """Adam, batches of 128, learning rate falling linearly from 1.2e-3."""
    x, y = realdata.fashion_mnist("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)
    steps = epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    generator = torch.Generator().manual_seed(seed)
    hold = masks.hold(net, optimizer) if masks else None
    net.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    if hold:
        hold.release()
    return net


def criteria(seed: int) -> dict[str, sc.Criterion]:
    """What prunes at initialisation."""
    return {
        "random": sc.Random(seed),
        "magnitude": sc.Magnitude(),
        "snip": sc.SNIP(),
        "grasp": sc.GraSP(),
        "synflow": sc.SynFlow(),
    }


def run(seed: int, epochs: int) -> list[dict[str, object]]:
    """All runs of one seed."""
    torch.manual_seed(seed)
    start = realdata.LeNet300()
    test = realdata.fashion_mnist("test")
    batches = realdata.calibration("fashion_mnist", 1024, 128)
    dense = train(copy.deepcopy(start), epochs, seed, None)
    rows: list[dict[str, object]] = [
        {"criterion": "dense", "sparsity": 0.0, "seed": seed, "accuracy": realdata.accuracy(dense, *test)}
    ]
    for sparsity in SPARSITIES:
        trained = copy.deepcopy(dense)
        sc.prune_(trained, sc.Magnitude(), sparsity, allocation=sc.global_)
        found = {"magnitude after training": realdata.accuracy(trained, *test)}
        for name, criterion in criteria(seed).items():
            net = copy.deepcopy(start)
            masks = sc.prune_(
                net, criterion, sparsity, allocation=sc.global_, batches=batches, loss=F.cross_entropy
            ).masks
            found[name] = realdata.accuracy(train(net, epochs, seed, masks), *test)
            masks.check(net)
        rows += [
            {"criterion": n, "sparsity": sparsity, "seed": seed, "accuracy": v} for n, v in found.items()
        ]
        print(seed, sparsity, found, flush=True)
    return rows


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    rows = [row for seed in range(arguments.seeds) for row in run(seed, arguments.epochs)]
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": machine(), "epochs": arguments.epochs, "rows": rows}
    (RESULTS / "at_init.json").write_text(json.dumps(result, indent=1) + "\n")
    names = list(dict.fromkeys(str(r["criterion"]) for r in rows if r["criterion"] != "dense"))

    def text(name: str, sparsity: float) -> str:
        values = [
            float(str(r["accuracy"])) for r in rows if (r["criterion"], r["sparsity"]) == (name, sparsity)
        ]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4f}{spread}"

    lines = [
        "# Pruning at initialisation",
        "",
        f"LeNet-300-100, Fashion-MNIST, {arguments.epochs} epochs, {arguments.seeds} seeds, test accuracy. "
        f"Written by `python -m benchmarks.at_init`. Dense: {text('dense', 0.0)}.",
        "",
        "| pruned by | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |",
        "| --- |" + " ---: |" * len(SPARSITIES),
        *(f"| {name} | " + " | ".join(text(name, s) for s in SPARSITIES) + " |" for name in names),
        "",
    ]
    (RESULTS / "at_init.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
