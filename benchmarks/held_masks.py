"""Cost of held masks in a training step with AdamW, on ResNet-20 and MiniLM.

    python -m benchmarks.held_masks [--steps 30]

A step is forward, backward and `AdamW.step()`. What the masks add is timed inside the same steps (the time of
the optimizer hook alone) and stated as a share of the whole step and of the optimizer's own step. Written to
`benchmarks/results/held_masks.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from benchmarks import realdata
from benchmarks.probe import machine

RESULTS = Path(__file__).parent / "results"


def measure(
    model: nn.Module, batches: list[Any], loss: Callable[..., torch.Tensor], steps: int
) -> dict[str, float]:
    """Medians over `steps` training steps at 90 % sparsity, in seconds and as shares."""
    masks = sc.prune_(model, sc.Magnitude(), 0.9, allocation=sc.global_).masks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    marks: list[float] = []
    # Hooks run in the order of registration: the clock before and after the masks' own.
    optimizer.register_step_post_hook(lambda *_: marks.append(time.perf_counter()))
    hold = masks.hold(model, optimizer)
    optimizer.register_step_post_hook(lambda *_: marks.append(time.perf_counter()))
    whole, step, held = [], [], []
    for i in range(steps + 3):
        x, y = batches[i % len(batches)]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        before = time.perf_counter()
        optimizer.step()
        if i >= 3:
            whole.append(marks[-2] - start)
            step.append(marks[-2] - before)
            held.append(marks[-1] - marks[-2])
    masks.check(model)
    hold.release()
    medians = {
        "train_step": statistics.median(whole),
        "adamw": statistics.median(step),
        "masks": statistics.median(held),
    }
    return medians | {
        "share_of_train_step": statistics.median(h / w for h, w in zip(held, whole, strict=True)),
        "share_of_adamw": statistics.median(h / s for h, s in zip(held, step, strict=True)),
        "masked_weights": float(masks.entries),
    }


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    results: dict[str, Any] = {"machine": machine()}
    images = realdata.calibration("cifar10", 512, 128)
    results["resnet20, batch 128"] = measure(realdata.resnet20(), images, F.cross_entropy, steps)
    pairs = realdata.calibration("stsb", 128, 16)
    results["minilm, 16 pairs of sentences"] = measure(
        realdata.StsModel(realdata.minilm()), pairs, realdata.sts_loss, steps
    )
    print(json.dumps(results, indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "held_masks.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
