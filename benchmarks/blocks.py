"""Block by block or whole: whether models of the zoo give the same when they are entered behind their blocks.

    python -m benchmarks.blocks [--family transformers] [--only NAME ...] [--jobs 2] [--again]
                                [--out benchmarks/results/blocks.jsonl]

For each model: the chain of its blocks and behind how many of them it may be entered (`enterable`); then,
told by other means, the output of the whole model against that with the first 1, 2, ... blocks answered by
what they returned (largest difference, relative to the output's spread); then pruned by SparseGPT to 50 %,
sparsity counted, layers that cannot be solved left out with the reason. Each model has a process of its own,
one thread and 180 seconds. Written beside the results: `blocks.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks import zoo
from benchmarks.coverage import RESULTS, arguments, chosen
from benchmarks.zoo import runner
from benchmarks.zoo.runner import Row
from secateur.collect.batches import Batch
from secateur.reconstruct.consumers import consumers_of
from secateur.reconstruct.order import measuring
from secateur.stream.states import States
from secateur.stream.walk import Walk, enterable

STAGES = ("build", "enter", "agree", "solve")


def worker(name: str) -> None:
    """All stages of one model; a stage whose input failed is left out."""
    torch.set_num_threads(1)
    got: dict[str, Any] = {}

    def build() -> Row:
        model, args, kwargs = zoo.build(name)
        got["model"], got["batch"] = model, Batch(args, kwargs, None)
        return {"params": sum(p.numel() for p in model.parameters())}

    def enter() -> Row:
        model = got["model"]
        targets = sc.select(model).targets
        got["consumers"], got["unseen"] = consumers_of(model, [t.name for t in targets])
        chain, limit, why = enterable(model, got["consumers"], got["batch"])
        got["chain"], got["limit"] = chain, limit
        return {"blocks": len(chain.blocks), "limit": limit, "why": why, "unseen": len(got["unseen"])}

    def agree() -> Row:
        error = agreement(got["model"], got["batch"], got["chain"], got["limit"])
        row: Row = {"error": error}
        if error > 1e-5:
            row |= {"ok": False, "failure": f"the output differs by {error:.1e}"}
        return row

    def solve() -> Row:
        return solved(got["model"], got["batch"], got["unseen"])

    if runner.stage("build", build) and runner.stage("enter", enter) and runner.stage("agree", agree):
        runner.stage("solve", solve)


def agreement(model: torch.nn.Module, batch: Batch, chain: Any, limit: int) -> float:
    """Largest difference between whole passes and those that begin behind blocks, relative to the spread.

    Of the model's outputs; where not all blocks can be entered behind, of what the next block returns.
    """
    known: dict[int, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, i=i: known.setdefault(i, out))
        for i, name in enumerate(chain.blocks)
    ]
    with measuring(model):
        torch.manual_seed(0)
        known[-1] = batch.forward(model)
    for handle in handles:
        handle.remove()
    whole = limit == len(chain.blocks)
    walk, worst = Walk(model, chain, [batch], States()), 0.0
    for n in range(1, limit + 1):
        walk.advance(n)
        found: list[Any] = []
        module = model if whole else model.get_submodule(chain.blocks[n])
        handle = module.register_forward_hook(lambda m, a, out, f=found: f.append(out))
        with measuring(model):
            walk.run(0, None if whole else n + 1)
        handle.remove()
        for a, b in zip(zoo.tensors(found[0]), zoo.tensors(known[-1 if whole else n]), strict=True):
            if a.shape != b.shape:
                return float("inf")
            if b.numel() and b.is_floating_point():
                worst = max(worst, float((a - b).abs().max() / b.std(correction=0).clamp(min=1e-3)))
    return worst


def solved(model: torch.nn.Module, batch: Batch, unseen: dict[str, str]) -> Row:
    """Prune to one half, without the layers that a solver cannot see or no token reaches."""
    out = tuple(unseen)
    for _ in range(40):
        where = sc.Where(exclude=out) if out else None
        try:
            data = [(batch.args, None) if batch.args else batch.kwargs]
            report = sc.prune_(model, sc.SparseGPT(), 0.5, where=where, batches=data)
        except sc.StatsError as error:
            name = str(error).partition("No batch reaches ")[2].partition(",")[0]
            if not name:
                raise
            out = (*out, name)
            continue
        whole = [n for n in report.notes if "as a whole" in n]
        return {"sparsity": report.sparsity, "excluded": len(out), "whole": whole[:1]}
    return {"ok": False, "failure": f"more than 40 layers that no batch reaches, {out[-1]} among them"}


def verdict(row: Row) -> str:
    """What became of a model, in words."""
    for stage in STAGES:
        found = row["stages"].get(stage)
        if found is None:
            return f"{stage}: {row['ended'] or 'not reached'}"
        if not found["ok"]:
            return f"{stage}: {found['failure']} ({found.get('at', 'compared')})"
    enter = row["stages"]["enter"]
    if enter["blocks"] == 0:
        return "whole: no list of blocks that run once"
    if enter["limit"] < enter["blocks"] - 1:
        return f"whole behind {enter['limit']} of {enter['blocks']}: {enter['why']}"
    return "block by block"


def write(rows: dict[str, Row], path: Path) -> None:
    """The tables as Markdown."""
    order = {name: i for i, name in enumerate(zoo.names())}
    ordered = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
    lines = ["# Block by block", "", "Written by `python -m benchmarks.blocks`.", "", *_summary(ordered), ""]
    lines += ["| model | blocks | entered behind | output differs | excluded | result |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for row in ordered:
        stages = row["stages"]
        enter, agree, solve = (stages.get(s, {}) for s in ("enter", "agree", "solve"))
        error = agree.get("error")
        cells = [
            row["name"],
            enter.get("blocks", ""),
            enter.get("limit", ""),
            "" if error is None else f"{error:.0e}",
            solve.get("excluded", ""),
            verdict(row).replace("|", "/"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(rows: Iterable[Row]) -> list[str]:
    by_family: dict[str, list[str]] = {}
    for row in rows:
        by_family.setdefault(row["name"].split("/")[0], []).append(verdict(row))
    lines = ["| family | models | block by block | whole, with the reason | failed |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for family, found in by_family.items():
        blocks = sum(v == "block by block" for v in found)
        whole = sum(v.startswith("whole") for v in found)
        lines.append(f"| {family} | {len(found)} | {blocks} | {whole} | {len(found) - blocks - whole} |")
    return lines


def main() -> None:
    """Run what is asked, write the tables."""
    given = arguments(__doc__, RESULTS / "blocks.jsonl", 180).parse_args()
    if given.worker:
        worker(given.worker)
        return
    rows = runner.run(
        "benchmarks.blocks",
        chosen(given),
        given.out,
        jobs=given.jobs,
        limit=given.limit,
        again=given.again,
        verdict=verdict,
    )
    write(rows, given.out.with_suffix(".md"))
    print("\n".join(_summary(rows.values())))


if __name__ == "__main__":
    main()
