"""Speed and error of solvers on single layers, beside the authors' code, in one run.

    python -m benchmarks.solvers --sparsegpt DIR --alps DIR

DIR: checkouts of the authors' repositories, see `benchmarks/authors.py`. Random layers whose inputs are
correlated and of unlike scale. Each time is the median over rounds in which all solvers take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.authors import Authors
from secateur.core.files import write_text
from secateur.patterns import NM, Pattern, Unstructured
from secateur.solvers import ALPS, Quadratic, SparseGPT

FILE = Path(__file__).parent / "results" / "solvers.json"
SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096))
CASES: tuple[tuple[str, Pattern, float, int, int], ...] = (
    ("50 %", Unstructured(), 0.5, 0, 0),
    ("70 %", Unstructured(), 0.7, 0, 0),
    ("2:4", NM(2, 4), 0.5, 2, 4),
)


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of twice as many tokens as inputs, correlated, of log-normal scale."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    x = torch.randn(2 * inputs, inputs, generator=draw) @ mix * torch.randn(inputs, generator=draw).exp()
    return torch.randn(outputs, inputs, generator=draw), x.T @ x / len(x)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsegpt", type=Path, required=True)
    parser.add_argument("--alps", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of the layers, smallest first"
    )
    parser.add_argument(
        "--all", action="store_true", help="ALPS's authors' code on all layers, not only the smallest: hours"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    authors = Authors.of(arguments.sparsegpt, arguments.alps)
    rows = []
    for i, shape in enumerate(SHAPES[: arguments.shapes]):
        weight, gram = layer(*shape)
        for name, pattern, sparsity, n, m in CASES:
            runs = solvers(authors, weight, gram, pattern, sparsity, n, m)
            if i and not arguments.all:
                del runs["ALPS, authors"]
            rows.append({"shape": shape, "case": name, **measured(runs, weight, gram, arguments.rounds)})
            print(json.dumps(rows[-1]), flush=True)
    data = {
        "command": "python -m benchmarks.solvers --sparsegpt DIR --alps DIR "
        f"--rounds {arguments.rounds} --threads {arguments.threads} --shapes {arguments.shapes}"
        f"{' --all' if arguments.all else ''}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
        "torch": torch.__version__,
        "authors": authors.digests,
        "rows": rows,
    }
    write_text(FILE, json.dumps(data, indent=1) + "\n")


def solvers(
    authors: Authors, weight: Tensor, gram: Tensor, pattern: Pattern, sparsity: float, n: int, m: int
) -> dict[str, Callable[[], Tensor]]:
    """Each from the Gram matrix to the pruned weights; nothing is shared between them."""
    return {
        "SparseGPT, authors": lambda: authors.prune_sparsegpt(weight, gram, sparsity, n, m),
        "SparseGPT": lambda: SparseGPT()(weight, Quadratic(gram), pattern, sparsity).weight,
        "ALPS, authors": lambda: authors.prune_alps(weight, gram, sparsity, n, m),
        "ALPS": lambda: ALPS()(weight, Quadratic(gram), pattern, sparsity).weight,
    }


def measured(
    runs: dict[str, Callable[[], Tensor]], weight: Tensor, gram: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds, seconds over those of the authors' SparseGPT, and error, of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors, objective = {}, Quadratic(gram)
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            pruned = run()
            seconds[name].append(time.perf_counter() - started)
            errors[name] = objective.error(pruned, weight)
    base = statistics.median(seconds["SparseGPT, authors"])
    return {
        name: {"seconds": statistics.median(t), "ratio": statistics.median(t) / base, "error": errors[name]}
        for name, t in seconds.items()
    }


if __name__ == "__main__":
    main()
