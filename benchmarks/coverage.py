"""Coverage: half of every interior group removed from every model of the zoo, and the result proven.

    python -m benchmarks.coverage [--family transformers] [--only NAME ...] [--jobs 2] [--again]
                                  [--out benchmarks/results/coverage.jsonl]

For each model: traced; half of the units of every group inside a block (filters, neurons, heads, KV groups,
head dimensions, ...) removed at random; forward and backward; the difference from the masked twin and what
pruning changes (where float32 exceeds 1e-5, since random weights can amplify rounding, float64 decides, to
1e-6); the permutation oracle where zeroing is not removing; saved, and loaded by a fresh process.
Each model has a process of its own, one thread and 180 seconds. Models that the results file has already are
not run again. Written beside it: `coverage.md`, the tables.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import zoo
from benchmarks.zoo import runner, stages
from benchmarks.zoo.runner import Row

RESULTS = Path(__file__).parent / "results"
STAGES = ("build", "trace", "prune", "forward", "backward", "twin", "permute", "roundtrip")


def worker(name: str) -> None:
    """All stages of one model; a stage whose input failed is left out."""
    torch.set_num_threads(1)
    got: dict[str, Any] = {}

    def build() -> Row:
        model, args, kwargs = zoo.build(name)
        got["model"], got["example"] = model, (args, kwargs)
        return {"params": sum(p.numel() for p in model.parameters())}

    def trace() -> Row:
        got["graph"], row = stages.trace(got["model"], got["example"])
        return row

    def prune() -> Row:
        graph = got["graph"]
        groups = graph.groups()
        # A few models of sums alone have no group inside a block: there the exact groups are cut.
        chosen = [g for g in groups if g.interior] or [g for g in groups if g.exact]
        wanted = stages.choose(graph, chosen, zoo.seed_of(name))
        kept, refusals = stages.fit(graph, wanted) if wanted else ({}, [])
        if not kept:
            raise AssertionError(f"Nothing could be cut of {len(wanted)} groups. {' '.join(refusals)[:200]}")
        got["kept"] = kept
        got["pruned"], got["plan"], row = stages.prune(got["model"], kept)
        return row | {"given_back": len(wanted) - len(kept), "refusals": refusals[:3]}

    if not (runner.stage("build", build) and runner.stage("trace", trace)):
        return
    runner.stage("permute", lambda: stages.permute(got["graph"], got["model"], got["example"]))
    if not runner.stage("prune", prune):
        return
    model, pruned, example = got["model"], got["pruned"], got["example"]
    runner.stage("forward", lambda: stages.forward(model, pruned, example))
    runner.stage("twin", lambda: stages.twin(got["graph"], model, got["kept"], pruned, example))
    runner.stage("backward", lambda: stages.backward(model, pruned, example))
    with tempfile.TemporaryDirectory() as folder:
        runner.stage("roundtrip", lambda: stages.roundtrip(name, pruned, got["plan"], example, Path(folder)))


def passed(row: Row, stage: str) -> bool:
    """Whether a model got through a stage."""
    return bool(row["stages"].get(stage, {}).get("ok", False))


def verdict(row: Row) -> str:
    """`ok`, or the first stage that failed and why."""
    for stage in STAGES:
        if not passed(row, stage):
            found = row["stages"].get(stage)
            if found is not None:
                return f"{stage}: {found['failure']} ({found.get('at', 'compared')})"
            if row["ended"]:
                return f"{stage}: {row['ended']}"
            return f"{stage}: not reached"
    return "ok"


def summary(rows: Iterable[Row]) -> list[str]:
    """One line for each family: how many models passed each stage."""
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row["name"].split("/")[0], []).append(row)
    head = ["family", "models", *STAGES, "all", "trace s (median, max)", "share prunable"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for family, group in by_family.items():
        counts = [sum(passed(row, stage) for row in group) for stage in STAGES]
        traced = [row["stages"]["trace"] for row in group if passed(row, "trace")]
        seconds = [t["trace_seconds"] for t in traced] or [0.0]
        share = statistics.mean([t["share"] for t in traced] or [0.0])
        whole = sum(verdict(row) == "ok" for row in group)
        cells = [family, len(group), *counts, whole, f"{statistics.median(seconds):.2f}, {max(seconds):.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{share:.1%}"])) + " |")
    return lines


def _number(row: Row, stage: str, key: str, form: str = ".0e") -> str:
    value = row["stages"].get(stage, {}).get(key)
    return "" if value is None else format(value, form)


def _in_double(row: Row) -> str:
    error = _number(row, "twin", "error_in_float64")
    return f" ({error} in float64)" if error else ""


def table(rows: Iterable[Row]) -> list[str]:
    """One line for each model."""
    head = ["model", "M parameters", "trace s", "groups", "share prunable", "left", "twin error", "change"]
    head += ["permutation error", "result"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 2) + " --- |"]
    for row in rows:
        kinds = row["stages"].get("trace", {}).get("kinds", {})
        params = row["stages"].get("build", {}).get("params", 0)
        cells = [
            row["name"],
            f"{params / 1e6:.1f}",
            _number(row, "trace", "trace_seconds", ".2f")
            + ("" if row["stages"].get("trace", {}).get("fake", True) else " (real)"),
            ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            _number(row, "trace", "share", ".1%"),
            _number(row, "prune", "left", ".0%"),
            _number(row, "twin", "error") + _in_double(row),
            _number(row, "twin", "change"),
            _number(row, "permute", "error"),
            verdict(row).replace("|", "/"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def frozen(rows: Iterable[Row]) -> list[str]:
    """Why parameters were held back, for models of which more than a twentieth was."""
    lines = ["| model | share | reason |", "| --- | ---: | --- |"]
    for row in rows:
        for entry in row["stages"].get("trace", {}).get("frozen", []):
            if entry["share"] > 0.05:
                lines.append(
                    f"| {row['name']} | {entry['share']:.1%} | {entry['reason']} |".replace("\n", " ")
                )
    return lines


def write(rows: dict[str, Row], path: Path) -> None:
    """The tables as Markdown."""
    order = {name: i for i, name in enumerate(zoo.names())}
    ordered = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
    parts = ["# Coverage", "", "Models that got through each stage.", "", *summary(ordered), ""]
    parts += ["## Each model", "", *table(ordered), "", "## Frozen dimensions", "", *frozen(ordered), ""]
    path.write_text("\n".join(parts), encoding="utf-8")


def arguments(description: str | None, out: Path, limit: float) -> argparse.ArgumentParser:
    """What the drivers of the zoo understand."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=list(zoo.FAMILIES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names such as transformers/llama")
    parser.add_argument("--subset", action="store_true", help="the forty models of the tests")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=limit, help="seconds for one model")
    parser.add_argument("--again", action="store_true", help="run what the results have already, too")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def chosen(given: argparse.Namespace) -> list[str]:
    """The names that the arguments ask for."""
    if given.only:
        return list(given.only)
    if given.subset:
        return list(zoo.SUBSET)
    return [name for family in given.family or zoo.FAMILIES for name in zoo.names(family)]


def main() -> None:
    """Run what is asked, write the tables."""
    given = arguments(__doc__, RESULTS / "coverage.jsonl", 180).parse_args()
    if given.worker:
        worker(given.worker)
        return
    rows = runner.run(
        "benchmarks.coverage",
        chosen(given),
        given.out,
        jobs=given.jobs,
        limit=given.limit,
        again=given.again,
        verdict=verdict,
    )
    write(rows, given.out.with_suffix(".md"))
    print("\n".join(summary(rows.values())))


if __name__ == "__main__":
    main()
