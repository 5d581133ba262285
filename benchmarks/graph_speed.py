"""From model to groups: time against Torch-Pruning on models that both handle, and an 8 B model's shapes.

    python -m benchmarks.graph_speed [--out benchmarks/results/graph_speed.json]

Both sides start from a built model and an example input and end with the list of groups. They alternate in
one process, one thread; the figure is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.zoo import operators

MODELS = ("resnet50", "densenet161", "vit_b_16", "convnext_tiny")
RUNS = 5


def ours(model: nn.Module, x: torch.Tensor) -> int:
    return len(sc.Graph.trace(model, x).groups())


def theirs(model: nn.Module, x: torch.Tensor) -> int:
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    return len(list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])))


def seconds(run: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    groups = run()
    return time.perf_counter() - start, groups


def compare(name: str) -> dict[str, Any]:
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours(model, x)  # both import and compile what they need once
    theirs(model, x)
    pairs = [(seconds(lambda: ours(model, x)), seconds(lambda: theirs(model, x))) for _ in range(RUNS)]
    return {
        "model": name,
        "ours_s": statistics.median(a for (a, _), _ in pairs),
        "theirs_s": statistics.median(b for _, (b, _) in pairs),
        "ratio": statistics.median(b / a for (a, _), (b, _) in pairs),
        "our_groups": pairs[0][0][1],
        "their_groups": pairs[0][1][1],
    }


def large() -> dict[str, Any]:
    """Llama-3-8B's shapes on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    took, groups = seconds(lambda: ours(model, torch.zeros(1, 16, dtype=torch.long)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"model": "llama-3-8b on meta", "ours_s": took, "our_groups": groups, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/graph_speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [large()]
    print(rows[-1])
    operators.prepare()
    for name in MODELS:
        rows.append(compare(name))
        print(rows[-1])
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
    }
    args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
