"""The reference: the same models through Torch-Pruning, by a weak test.

    python -m benchmarks.zoo.reference [--family transformers] [--only NAME ...] [--jobs 2]
                                       [--out benchmarks/results/coverage_torch_pruning.jsonl]

Torch-Pruning 1.6.1 removes half of all channels by magnitude (`BasePruner`, `MagnitudeImportance`); the
layers that make the outputs are left alone, and the numbers of heads are handed to it wherever a module
states them beside its query, key and value (or fused) layers. A model counts if that ends within 90 seconds,
the outputs keep their shapes, and more than 5 % of the parameters are gone. Whether the outputs are right is
not asked, and nothing that is peculiar to a model is repaired afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import coverage, zoo
from benchmarks.zoo import runner, tensors
from benchmarks.zoo.runner import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUERIES = ("q", "query", "q_proj", "q_lin", "wq", "query_proj", "linear_q", "q_head")
KEYS_VALUES = (
    *("k", "key", "k_proj", "k_lin", "wk", "key_proj", "linear_k", "k_head"),
    *("v", "value", "v_proj", "v_lin", "wv", "value_proj", "linear_v", "v_head"),
)
FUSED = ("qkv", "c_attn", "query_key_value", "qkv_proj", "in_proj", "wqkv")
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nh")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def stated(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """A number of heads that a module or its configuration states."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def head_counts(model: nn.Module) -> dict[nn.Module, int]:
    """Query, key, value and fused layers, each with the number of its heads."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        heads = stated(module, HEADS)
        if heads is None:
            continue
        kv_heads = stated(module, KV_HEADS) or heads
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear | nn.Conv2d):
                continue
            if name.lower() in QUERIES + FUSED:
                found[child] = heads
            elif name.lower() in KEYS_VALUES:
                found[child] = kv_heads
    return found


def output_layers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[nn.Module]:
    """Layers with weights whose result is an output, or the last of all if none is."""
    made: dict[int, nn.Module] = {}
    order: list[nn.Module] = []
    keep: list[Any] = []  # while these live no other tensor has their identity

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[output.data_ptr()] = module
            order.append(module)
            keep.append(output)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = [made[t.data_ptr()] for t in tensors(output) if t.data_ptr() in made]
    return found or order[-1:]


def prune(name: str) -> Row:
    """One model through Torch-Pruning."""
    import torch_pruning

    model, args, kwargs = zoo.build(name)
    with torch.no_grad():
        shapes = [t.shape for t in tensors(model(*args, **kwargs))]
    before = sum(p.numel() for p in model.parameters())
    example: Any = kwargs if kwargs else args
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=output_layers(model, args, kwargs),
        num_heads=head_counts(model),
        output_transform=tensors,
    )
    pruner.step()
    with torch.no_grad():
        after = [t.shape for t in tensors(model(*args, **kwargs))]
    left = sum(p.numel() for p in model.parameters()) / before
    if after != shapes:
        raise AssertionError(f"The outputs were {shapes} and are {after}.")
    if left > 0.95:
        raise AssertionError(f"{left:.1%} of the parameters are left.")
    return {"left": round(left, 4)}


def verdict(row: Row) -> str:
    """`ok`, or why not."""
    found = row["stages"].get("prune")
    if found is None:
        return str(row["ended"])
    return "ok" if found["ok"] else f"{found['failure']} ({found['at']})"


def write(rows: dict[str, Row], path: Path) -> None:
    """Counts of each family and every failure, as Markdown."""
    lines = [
        "# Torch-Pruning 1.6.1 on the same models",
        "",
        "| family | models | ok |",
        "| --- | ---: | ---: |",
    ]
    for family in zoo.FAMILIES:
        group = [verdict(row) for row in rows.values() if row["name"].startswith(f"{family}/")]
        lines.append(f"| {family} | {len(group)} | {group.count('ok')} |")
    lines += ["", "| model | seconds | left | result |", "| --- | ---: | ---: | --- |"]
    for row in rows.values():
        left = row["stages"].get("prune", {}).get("left")
        share = "" if left is None else f"{left:.0%}"
        lines.append(f"| {row['name']} | {row['seconds']} | {share} | {verdict(row).replace('|', '/')} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is asked, write the table."""
    given = coverage.arguments(__doc__, RESULTS / "coverage_torch_pruning.jsonl", 90).parse_args()
    if given.worker:
        torch.set_num_threads(1)
        runner.stage("prune", lambda: prune(given.worker))
        return
    rows = runner.run(
        "benchmarks.zoo.reference",
        coverage.chosen(given),
        given.out,
        jobs=given.jobs,
        limit=given.limit,
        again=given.again,
        verdict=verdict,
    )
    write(rows, given.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
