"""Exact global magnitude pruning of 135 M weights, against `torch.nn.utils.prune.global_unstructured`.

    python -m benchmarks.global_selection [--rounds 3] [--threads 2]

The shapes are SmolLM2-135M's, embedding included, with normal values (and float32 copies of bfloat16 values
as a second case, full of ties). Both start from the same weights, in turn, in one process; a round's ratio
compares the two runs of that round. Written to `benchmarks/results/global_selection.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import secateur as sc
from benchmarks.probe import PeakMemory, machine

RESULTS = Path(__file__).parent / "results"
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SPARSITY = 0.5


def build(ties: bool) -> nn.Module:
    """Linear layers of SmolLM2-135M's shapes; the first stands for the embedding."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for shape in [(49152, 576), *BLOCK * 30]:
        layer = nn.Linear(1, 1, bias=False)
        weight = torch.randn(shape, generator=generator) * 0.02
        layer.weight = nn.Parameter(weight.bfloat16().float() if ties else weight)
        layers.append(layer)
    return nn.Sequential(*layers)


def ours(model: nn.Module) -> int:
    """Number of weights that secateur removes."""
    return sc.prune_(model, sc.Magnitude(), SPARSITY, allocation=sc.global_, where=sc.Where(also="*")).removed


def theirs(model: nn.Module) -> int:
    """The peer, asked for the same count."""
    entries = sum(p.numel() for p in model.parameters())
    parameters = [(m, "weight") for m in model]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=entries // 2)
    return sum(int((m.weight_mask == 0).sum()) for m in model)


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))  # first calls load code
    weights_mib = sum(p.numel() for p in build(False).parameters()) * 4 / 2**20
    results: dict[str, object] = {"machine": machine(), "weights_mib": weights_mib}
    for ties in (False, True):
        rows = []
        for _ in range(arguments.rounds):
            row: dict[str, float] = {}
            for name, call in (("secateur", ours), ("torch", theirs)):
                model = build(ties)
                wanted = sum(p.numel() for p in model.parameters()) // 2
                with PeakMemory() as memory:
                    wall, cpu = time.perf_counter(), time.process_time()
                    removed = call(model)
                    row[f"{name}_seconds"] = time.perf_counter() - wall
                    row[f"{name}_cpu_seconds"] = time.process_time() - cpu
                assert removed == wanted, f"{name} removed {removed} of {wanted}"
                row[f"{name}_extra_mib"] = memory.extra
                del model
            row["ratio_wall"] = row["torch_seconds"] / row["secateur_seconds"]
            row["ratio_cpu"] = row["torch_cpu_seconds"] / row["secateur_cpu_seconds"]
            rows.append(row)
            print(row, flush=True)
        median = {key: round(statistics.median(r[key] for r in rows), 3) for key in rows[0]}
        # The largest, not the median: later rounds reuse memory that the earlier ones left on the heap.
        largest = max(row["secateur_extra_mib"] for row in rows)
        median["largest_extra_of_weights"] = round(largest / weights_mib, 3)
        results["bfloat16 values" if ties else "normal values"] = {"median": median, "rounds": rows}
        print(median)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "global_selection.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
