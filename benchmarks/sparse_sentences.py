"""MiniLM, pruned, embedding real questions: sparse layers against dense ones, end to end.

    python -m benchmarks.sparse_sentences [--sparsities 0.7 0.8 0.9] [--threads 1] [--runs 10]

Magnitude, ranked over all layers, without training: what is timed is the model, not what it knows.
Questions of Banking77, one alone and 16 at once, with plain transformers code. The embeddings of both
models are compared first. Medians of forward passes in turn, with quartiles; `layers` is what the linear
layers that were looked at gain by themselves at 1 and 64 tokens. Results in
`results/sparse_sentences.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks import realdata
from benchmarks.realdata.sentences import PAD, sentence_ids
from benchmarks.sparse_text import layers_alone
from secateur import runtime

FILE = Path(__file__).parent / "results" / "sparse_sentences.json"


def inputs(count: int) -> dict[str, torch.Tensor]:
    """The first questions of the test part, padded."""
    rows = [sentence_ids(text) for text in realdata.banking77("test")[0][:count]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def run(sparsity: float, stored: torch.dtype, runs: int) -> dict[str, Any]:
    """One model."""
    model = realdata.minilm()
    sc.prune_(model, sc.Magnitude(), sparsity, allocation=sc.global_)
    fast = runtime.compress(model, dtype=stored)
    compressed: runtime.CompressReport = fast.compress_report
    found: dict[str, Any] = {"sparsity": sparsity, "stored": str(stored).removeprefix("torch.")}
    found |= {"converted": len(compressed.converted), "of": len(compressed.layers)}
    found["layers"] = {n: layers_alone(compressed, n) for n in (1, 64)}
    for count in (1, 16):
        x = inputs(count)
        with torch.inference_mode():
            a, b = (m(**x).last_hidden_state for m in (model, fast))
        error = float((a - b).norm() / a.norm())
        if not error < (1e-4 if stored == torch.float32 else 2e-2):
            raise AssertionError(f"The embeddings differ by {error:.2e}.")
        report = runtime.bench(model, fast, x, runs=runs)
        row = report.rows[0]
        tokens = x["input_ids"].numel()
        found[f"{count} questions, {tokens} tokens"] = report.to_dict() | {
            "faster": row.speedup,
            "error": error,
        }
        print(sparsity, stored, count, tokens, f"{row.speedup:.2f}", f"{error:.1e}", flush=True)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.7, 0.8, 0.9])
    parser.add_argument("--stored", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        run(s, getattr(torch, stored), arguments.runs)
        for s in arguments.sparsities
        for stored in arguments.stored
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {runtime.kernels()}, torch {torch.__version__}"
    data = {"machine": machine, "threads": arguments.threads, "rows": rows}
    FILE.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
