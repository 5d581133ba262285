"""One-pass pruning of a language model: perplexity after each solver, the authors' own code beside ours.

    python -m benchmarks.oneshot_llm [--sparsegpt DIR --alps DIR] [--cells "50 %" 2:4] [--samples 64]

SmolLM2-135M. Calibration: windows of 512 tokens of WikiText-2's validation text, the same for all; perplexity
on the first six windows of 1,024 tokens of its test text. All solvers go through the same driver, `prune_`:
layer after layer in the order of execution, each fitted to what the pruned layers before pass on. DIR:
checkouts of the authors' repositories, see `benchmarks/authors.py`; without them their rows are left out.
Layer errors are means over all layers, on the calibration data and on windows that nothing was fitted to.
Finished cells are kept in `results/oneshot_llm.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import realdata
from benchmarks.authors import Authors
from secateur.patterns import Pattern
from secateur.solvers import Quadratic, Solved, Solver

FILE = Path(__file__).parent / "results" / "oneshot_llm.jsonl"
TABLE = FILE.with_suffix(".md")
LENGTH = 512
HELD_OUT = 8  # windows for the held-out errors, after those of the calibration
WINDOWS = 6
CELLS: dict[str, tuple[Pattern, float]] = {
    "50 %": (sc.Unstructured(), 0.5),
    "60 %": (sc.Unstructured(), 0.6),
    "70 %": (sc.Unstructured(), 0.7),
    "2:4": (sc.NM(2, 4), 0.5),
    "4:8": (sc.NM(4, 8), 0.5),
}


@dataclass(frozen=True)
class Theirs:
    """The authors' code as a solver."""

    name: str
    run: Callable[[Tensor, Tensor, float, int, int], Tensor]
    damping: float = 0.0

    def __call__(self, weight: Tensor, objective: Quadratic, pattern: Pattern, sparsity: float) -> Solved:
        n, m = (pattern.n, pattern.m) if isinstance(pattern, sc.NM) else (0, 0)
        pruned = self.run(weight, objective.undamped_II, sparsity, n, m).float()
        return Solved.of(pruned, pruned != 0, weight, objective)


@dataclass(frozen=True)
class Method:
    """A solver and how it is driven."""

    solver: Solver
    options: dict[str, Any] = field(default_factory=dict)
    searched: bool = False


# Fewer windows, levels and generations than by default: most of an hour on one core as it is.
SEARCH = {"solver": sc.SparseGPT(), "generations": 20, "offspring": 16, "step": 0.1, "reach": 0.2}
SEARCH_WINDOWS = 8

TUNED = {"correction": 0.01, "reconstruct": sc.Reconstruct()}


def methods(authors: Authors | None) -> dict[str, Method]:
    """Every method; magnitude and Wanda in the same sequential driver, weights as they were."""
    ours = {
        "magnitude": Method(sc.Select(sc.Magnitude(), steps=0)),
        "wanda": Method(sc.Select(sc.Wanda(), steps=0)),
        "wanda, fitted": Method(sc.Select(sc.Wanda())),
        "sparsegpt": Method(sc.SparseGPT()),
        "alps": Method(sc.ALPS()),
        "alps, corrected": Method(sc.ALPS(), {"correction": 0.01}),
        "alps, corrected, reconstructed": Method(sc.ALPS(), TUNED),
        "alps, searched": Method(sc.ALPS(), searched=True),
        "alps, searched, corrected, reconstructed": Method(sc.ALPS(), TUNED, searched=True),
    }
    if authors is None:
        return ours
    return ours | {
        "sparsegpt, authors": Method(Theirs("sparsegpt", authors.prune_sparsegpt)),
        "alps, authors": Method(Theirs("alps", authors.prune_alps)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsegpt", type=Path)
    parser.add_argument("--alps", type=Path)
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--methods", nargs="*", help="all if not given")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    both = arguments.sparsegpt and arguments.alps
    found = methods(Authors.of(arguments.sparsegpt, arguments.alps) if both else None)
    done = {(r["cell"], r["method"], r["samples"]) for r in _rows()}
    if ("dense", "dense", 0) not in done:
        _write(
            {"cell": "dense", "method": "dense", "samples": 0, "perplexity": _perplexity(realdata.smollm2())}
        )
    for cell in arguments.cells:
        for method in arguments.methods or found:
            if found[method].searched and isinstance(CELLS[cell][0], sc.NM):
                continue  # the pattern fixes the sparsity of every layer
            if (cell, method, arguments.samples) not in done:
                result = run(found[method], *CELLS[cell], arguments.samples)
                _write({"cell": cell, "method": method, "samples": arguments.samples, **result})
    write_table()


def run(method: Method, pattern: Pattern, sparsity: float, samples: int) -> dict[str, float]:
    """Prune a fresh model; perplexity, layer errors and time."""
    model = realdata.smollm2()
    windows = [ids for ids, _ in realdata.calibration("wikitext2", samples + HELD_OUT, 1)]
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    started = time.perf_counter()
    options = dict(method.options)
    if method.searched:
        options["allocation"] = sc.by_search(model, sparsity, batches=windows[:SEARCH_WINDOWS], **SEARCH)
    report = sc.prune_(model, method.solver, sparsity, pattern=pattern, batches=windows[:samples], **options)
    seconds = time.perf_counter() - started
    return {
        "perplexity": _perplexity(model),
        "sparsity": report.sparsity,
        "error": statistics.fmean(layer.error or 0.0 for layer in report.layers),
        "held_out": statistics.fmean(held_out(model, dense, windows[samples:]).values()),
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def held_out(model: nn.Module, dense: dict[str, Tensor], windows: list[Tensor]) -> dict[str, float]:
    """Error of each pruned layer on other windows, its inputs those of the pruned model."""
    targets = sc.select(model).targets
    lost: dict[str, list[float]] = {t.name: [0.0, 0.0] for t in targets}
    handles = []
    for t in targets:

        def hear(module: nn.Module, args: Any, name: str = t.name) -> None:
            x = args[0].flatten(0, -2)
            whole = x @ dense[name].T
            lost[name][0] += float((x @ module.weight.T - whole).square().sum())
            lost[name][1] += float(whole.square().sum())

        handles.append(t.module.register_forward_pre_hook(hear))
    for ids in windows:
        model(ids)
    for handle in handles:
        handle.remove()
    return {name: a / b for name, (a, b) in lost.items()}


def _perplexity(model: nn.Module) -> float:
    return realdata.wikitext2_perplexity(model, WINDOWS)


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def _write(row: dict[str, Any]) -> None:
    row |= {
        "command": f"python -m benchmarks.oneshot_llm --samples {row['samples']} --cells {row['cell']!r}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    with FILE.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    print({k: row[k] for k in row if k not in ("command", "machine", "torch")}, flush=True)


def write_table() -> None:
    """The results as Markdown: perplexity, and the mean error of layers, fitted and held out."""
    rows = _rows()
    dense = next(r for r in rows if r["cell"] == "dense")
    lines = ["# One-pass pruning of SmolLM2-135M", "", "Written by `python -m benchmarks.oneshot_llm`."]
    lines += [
        f"Perplexity on {WINDOWS} windows of 1,024 tokens of WikiText-2's test text; dense "
        f"{dense['perplexity']:.2f}. In brackets the mean error of layers, on the calibration data / others; "
        "those of a corrected row are against other targets on the calibration data, and on others against "
        "the dense weights, which it means to leave."
    ]
    sizes = {r["samples"] for r in rows if r["cell"] != "dense"}
    for samples in sorted(sizes):
        mine = [r for r in rows if r["samples"] == samples]
        cells = [c for c in CELLS if any(r["cell"] == c for r in mine)]
        lines += ["", f"## {samples} windows of {LENGTH} tokens", ""]
        lines += ["| method | " + " | ".join(cells) + " |", "| --- |" + " ---: |" * len(cells)]
        for method in dict.fromkeys(r["method"] for r in mine):
            at = {r["cell"]: r for r in mine if r["method"] == method}
            texts = [
                f"{at[c]['perplexity']:.2f} ({at[c]['error']:.4f} / {at[c]['held_out']:.4f})"
                if c in at
                else "—"
                for c in cells
            ]
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
