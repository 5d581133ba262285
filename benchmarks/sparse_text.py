"""SmolLM2-135M, pruned, writing text: sparse layers against dense float32 and bfloat16.

    python -m benchmarks.sparse_text [--sparsities 0.5 0.7] [--threads 1] [--new 32] [--runs 5]

Magnitude, the same share of each layer: what is timed is the model, not its wit. Each sparse model is
compared with the dense one in float32 first: the same tokens, greedily. `layers` is what the linear layers of
the blocks alone gain by the times measured for each kind of layer, weighted by their bytes. A model whose
values are stored as bfloat16 is measured with float32 activations, and wholly in bfloat16. Prompt and tokens
after it, in turn, median and quartiles, in `results/sparse_text.json`; rows of other models stay there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks.realdata.language import smollm2
from secateur import runtime

FILE = Path(__file__).parent / "results" / "sparse_text.json"


def written(model: Any, ids: torch.Tensor, new: int) -> list[int]:
    """Tokens written greedily after the prompt."""
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()


def layers_alone(report: runtime.CompressReport, tokens: int) -> float:
    """Dense over sparse time of all layers that were looked at and timed."""
    timed = [r for r in report.layers if tokens in r.speedup]
    before = sum(r.dense_bytes for r in timed)  # decoding is bound by memory: time goes with bytes
    return before / sum(r.dense_bytes / (r.speedup[tokens] if r.format else 1.0) for r in timed)


def run(sparsity: float, stored: torch.dtype, new: int, runs: int) -> dict[str, Any]:
    """One model."""
    model = smollm2()
    sc.prune_(model, sc.Magnitude(), sparsity, allocation=sc.uniform)
    ids = torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(0))
    fast = runtime.compress(model, dtype=stored)
    compressed: runtime.CompressReport = fast.compress_report  # type: ignore[assignment]
    same = copy.deepcopy(model)
    if stored != torch.float32:  # the same weights, rounded alike, in dense layers
        for report in compressed.converted:
            layer = fast.get_submodule(report.name)
            assert isinstance(layer, runtime.SparseLinear)
            with torch.no_grad():
                same.get_submodule(report.name).weight.copy_(layer.packed.unpack(torch.float32))
    equal = written(fast, ids, new) == written(same, ids, new)
    found = {"sparsity": sparsity, "stored": str(stored).removeprefix("torch."), "same tokens": equal}
    found["layers"] = {n: layers_alone(compressed, n) for n in (1, 64)}
    for name, dense in (("float32", model), ("bfloat16", copy.deepcopy(model).bfloat16())):
        report = runtime.bench_text(dense, fast, prompt=64, new=new, runs=runs)
        found[f"against {name}"] = report.to_dict() | {"faster": [row.speedup for row in report.rows]}
        print(sparsity, stored, name, [round(r.speedup, 2) for r in report.rows], flush=True)
    if stored == torch.bfloat16:  # the whole model in it, activations too
        narrow = copy.deepcopy(model).bfloat16()
        fast = runtime.compress(narrow)
        pairs = zip(written(fast, ids, new), written(narrow, ids, new), strict=True)
        report = runtime.bench_text(narrow, fast, prompt=64, new=new, runs=runs)
        found["in bfloat16"] = report.to_dict() | {
            "layers": {n: layers_alone(fast.compress_report, n) for n in (1, 64)},  # type: ignore[arg-type]
            "faster": [row.speedup for row in report.rows],
            "tokens equal to those of the dense one": sum(a == b for a, b in pairs) / new,
        }
        print(sparsity, "all bfloat16", [round(r.speedup, 2) for r in report.rows], flush=True)
    print("same tokens:", equal, "layers alone:", found["layers"], flush=True)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.7])
    parser.add_argument("--stored", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        run(s, getattr(torch, stored), arguments.new, arguments.runs)
        for s in arguments.sparsities
        for stored in arguments.stored
    ]
    made = [(row["sparsity"], row["stored"]) for row in rows]
    old = json.loads(FILE.read_text())["rows"] if FILE.is_file() else []
    rows = sorted(
        [row for row in old if (row["sparsity"], row["stored"]) not in made] + rows,
        key=lambda row: (row["sparsity"], row["stored"]),
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {runtime.kernels()}, torch {torch.__version__}"
    FILE.write_text(
        json.dumps({"machine": machine, "threads": arguments.threads, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
