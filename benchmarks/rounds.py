"""Why first- and second-order scores fall behind magnitude at high sparsity in one shot, and what mends it.

    python -m benchmarks.rounds

The scores are a local model of the loss around the dense network. Measured once, they do not know that
weights that go together mattered together; measured again after each of several smaller steps, they do. The
table compares 1 round with 4 at the same sparsity, data and final count. Written to
`benchmarks/results/rounds.md`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from benchmarks import realdata

RESULTS = Path(__file__).parent / "results"
ROUNDS = (1, 4)


def rows(
    model: nn.Module,
    batches: list[Any],
    loss: Callable[..., Tensor],
    metric: Callable[[nn.Module], float],
    sparsities: tuple[float, ...],
) -> list[str]:
    """A line of the table for each criterion and sparsity."""
    out = []
    for sparsity in sparsities:
        for name, criterion in (
            ("magnitude", sc.Magnitude()),
            ("taylor", sc.Taylor()),
            ("obd-fisher", sc.OBD()),
        ):
            cells = []
            for rounds in ROUNDS if name != "magnitude" else (1,):
                pruned = copy.deepcopy(model)
                sc.prune_(
                    pruned,
                    criterion,
                    sparsity,
                    allocation=sc.global_,
                    batches=batches,
                    loss=loss,
                    rounds=rounds,
                )
                sc.reestimate_batchnorm_(pruned, batches)
                cells.append(f"{metric(pruned):.4f}")
            cells += ["—"] * (len(ROUNDS) - len(cells))
            out.append(f"| {name} | {sparsity:.0%} | " + " | ".join(cells) + " |")
            print(out[-1], flush=True)
    return out


def main() -> None:
    """Three models."""
    images = realdata.fashion_mnist("test")
    photos = realdata.cifar10("test", 2000)
    cases = {
        "LeNet-300-100, Fashion-MNIST, test accuracy": rows(
            realdata.lenet300(),
            realdata.calibration("fashion_mnist", 512, 128),
            F.cross_entropy,
            lambda m: realdata.accuracy(m, *images),
            (0.8, 0.95),
        ),
        "ResNet-20, CIFAR-10 (JPEG), accuracy on 2,000 test images, batch normalisation re-estimated": rows(
            realdata.resnet20(),
            realdata.calibration("cifar10", 512, 128),
            F.cross_entropy,
            lambda m: realdata.accuracy(m, *photos),
            (0.7, 0.8),
        ),
        "MiniLM-L6, STS-b, Spearman correlation on 300 test pairs": rows(
            realdata.StsModel(realdata.minilm()),
            realdata.calibration("stsb", 96, 32),
            realdata.sts_loss,
            lambda m: realdata.sts_spearman(m, "test", 300),
            (0.7,),
        ),
    }
    lines = [
        "# Scores measured once, and again after each round",
        "",
        "Written by `python -m benchmarks.rounds`.",
    ]
    for title, table in cases.items():
        head = (
            "| criterion | sparsity | "
            + " | ".join(f"{r} round{'s' if r > 1 else ''}" for r in ROUNDS)
            + " |"
        )
        lines += ["", f"## {title}", "", head, "| --- | ---: |" + " ---: |" * len(ROUNDS), *table]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rounds.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
