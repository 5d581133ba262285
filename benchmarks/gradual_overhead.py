"""Cost of gradual pruning in a training step with AdamW, on ResNet-20 and MiniLM.

    python -m benchmarks.gradual_overhead [--steps 40]

A step is forward, backward and `AdamW.step()`. What `Gradual` adds is the time of its hooks inside the same
steps: zeroing after every step, and choosing the masks anew at every tenth. The share is that of a schedule
which changes masks every 100 steps, with a global ranking and with a uniform one. Written to
`benchmarks/results/gradual_overhead.json`.
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
TIMED, STATED = 10, 100  # steps between changes: here, and in the schedule that the share is stated for


def measure(
    model: nn.Module, batches: list[Any], loss: Callable[..., torch.Tensor], steps: int, allocation: Any
) -> dict[str, float]:
    """Medians in seconds, and the share of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    marks: list[float] = []

    def clock(*_: Any) -> None:
        marks.append(time.perf_counter())

    # Hooks run in the order of registration: the clock before and after the method's own.
    optimizer.register_step_pre_hook(clock)
    optimizer.register_step_post_hook(clock)
    schedule = sc.linear(0.5, 0.9, begin=0, end=steps + TIMED)
    method = sc.Gradual(model, sc.Magnitude(), schedule, when=sc.every(TIMED), allocation=allocation)
    attached = method.attach(optimizer)
    optimizer.register_step_pre_hook(clock)
    optimizer.register_step_post_hook(clock)
    whole, plain, changing = [], [], []
    for i in range(1, steps + 1):
        x, y = batches[i % len(batches)]
        marks.clear()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        before, ready, stepped, after = marks
        added = (ready - before) + (after - stepped)
        (changing if i % TIMED == 0 else plain).append(added)
        whole.append(stepped - start - (ready - before))
    attached.release()
    medians = {
        "train_step": statistics.median(whole),
        "zeroing": statistics.median(plain),
        "changing": statistics.median(changing),
    }
    added = medians["zeroing"] + (medians["changing"] - medians["zeroing"]) / STATED
    return medians | {"share_of_train_step": added / medians["train_step"]}


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    results: dict[str, Any] = {"machine": machine()}
    images = realdata.calibration("cifar10", 512, 128)
    pairs = realdata.calibration("stsb", 128, 16)
    for allocation in (sc.uniform, sc.global_):
        name = allocation.__name__
        results[f"resnet20, batch 128, {name}"] = measure(
            realdata.resnet20(), images, F.cross_entropy, steps, allocation
        )
        results[f"minilm, 16 pairs of sentences, {name}"] = measure(
            realdata.StsModel(realdata.minilm()), pairs, realdata.sts_loss, steps, allocation
        )
    print(json.dumps(results, indent=1))
    (RESULTS / "gradual_overhead.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
