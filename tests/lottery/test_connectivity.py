"""Lines between two trainings, masks in common, tables and pages of experiments."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import ArtifactError, SecateurError
from secateur.lottery import Finished, Lottery, Store, TicketTable, Twin, kept_paths
from secateur.lottery.connectivity import LinearPath, iou_by_chance
from secateur.lottery.table import confidence
from secateur.ticket_page import compare_page, plot_tickets, ticket_page
from tests.lottery.helpers import Noisy, fit, net, noisy, task


def test_a_line_in_closed_form() -> None:
    """Error w², between -1 and 3: largest at the end 3, and a barrier against the mean of the ends."""
    model = nn.Linear(1, 1, bias=False)
    own = model.weight.detach().clone()
    a, b = {"weight": torch.tensor([[3.0]])}, {"weight": torch.tensor([[-1.0]])}
    line = sc.linear_path(model, a, b, lambda m: float(m.weight) ** 2, points=5)
    assert line.alphas == (0.0, 0.25, 0.5, 0.75, 1.0) and line.errors == (1.0, 0.0, 1.0, 4.0, 9.0)
    assert line.barrier == 9 - (1 + 9) / 2
    assert LinearPath((0, 0.5, 1), (0.1, 0.4, 0.2)).barrier == pytest.approx(0.25)
    assert torch.equal(model.weight, own)
    with pytest.raises(SecateurError, match="at least 3 points"):
        sc.linear_path(model, a, b, lambda m: 0.0, points=2)


def test_statistics_of_normalisation_are_measured_anew() -> None:
    """A mean network's statistics are not the mean of statistics: between w and -w it passes nothing on."""
    model = nn.Sequential(nn.Linear(10, 4, bias=False), nn.BatchNorm1d(4))
    x = task(512)[0]
    a = {n: t.clone() for n, t in model.state_dict().items()}
    b = a | {"0.weight": a["0.weight"] + 1}
    seen: list[torch.Tensor] = []

    def error(m: nn.Module) -> float:
        assert not m.training
        seen.append(m(x).var(0, unbiased=True))
        return 0.0

    sc.linear_path(model, a, b, error, points=3, batches=[(x, None)])
    assert all(torch.allclose(v, torch.ones(4), atol=1e-3) for v in seen)
    seen.clear()
    sc.linear_path(model, a, b, error, points=3)
    assert not torch.allclose(seen[1], torch.ones(4), atol=0.1)
    assert model[1].num_batches_tracked == 0 and model.training


def test_barriers_of_tickets_and_their_twins(tmp_path: Path) -> None:
    run = noisy(controls=[Twin()], levels=2, seeds=(0, 1))
    table = run(tmp_path)
    data = [(task()[0], None)]
    found = sc.barriers(run, tmp_path, points=3, batches=data)
    assert [(p.level, p.seed) for p in found] == [(n, s) for n in (0, 1, 2) for s in (0, 1)]
    for p in found:
        ends = [table.values(b, p.level)[p.seed] for b in ("twin 1", "ticket")]
        # With statistics measured anew also at the ends, accuracies are near what was measured, not equal.
        assert [1 - p.errors[0], 1 - p.errors[-1]] == pytest.approx(ends, abs=0.1)
    plain = sc.barriers(run, tmp_path, points=3)
    for p in plain:
        ends = [table.values(b, p.level)[p.seed] for b in ("twin 1", "ticket")]
        assert [1 - p.errors[0], 1 - p.errors[-1]] == pytest.approx(ends, abs=1e-9)
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "paths").iterdir()}
    assert len(files) == 12 and sc.barriers(run, tmp_path, points=3) == plain
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / "paths").iterdir()}
    # Measured in two ways: a page shows those of the last.
    assert kept_paths(table, tmp_path) == plain != found
    with pytest.raises(SecateurError, match="Nothing named 'loss' was evaluated, but accuracy"):
        sc.barriers(run, tmp_path, value="loss")
    with pytest.raises(SecateurError, match="between tickets and their twins"):
        sc.barriers(noisy(), tmp_path)
    next((tmp_path / "paths").iterdir()).write_text("{}")
    with pytest.raises(ArtifactError, match="measured again"):
        kept_paths(table, tmp_path)


def test_instability_over_the_step_that_is_rewound_to(tmp_path: Path) -> None:
    run = noisy(controls=[Twin()], levels=1, seeds=(0,))
    found = sc.instability(run, tmp_path, [0, 20], points=3)
    assert {step: [p.level for p in paths] for step, paths in found.items()} == {0: [0, 1], 20: [0, 1]}
    store = Store(tmp_path)
    assert sum(r.branch == "ticket" and r.level == 0 for r in store.all()) == 1  # trained once
    # Copies that part after half of the training cannot end further apart than copies that part at once.
    apart = []
    for step in (0, 20):
        at = run.but(rewind=sc.rewind_to(step))
        rows = {r.branch: store.weights(r.key) for r in at.finished(store) if r.level == 0}
        a, b = (rows[name]["first.weight"] for name in ("ticket", "twin 1"))
        apart.append(float((a - b).norm()))
    assert apart[1] < apart[0]


def test_overlaps_against_counting(tmp_path: Path) -> None:
    run = noisy(levels=2, seeds=(0, 1, 2))
    table = run(tmp_path)
    found = sc.overlaps(table, tmp_path)
    store = Store(tmp_path)
    for o in found:
        masks = [store.masks(r.key)["first.weight"] for r in table if r.level == o.level]
        pairs = [(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        want = [float((a & b).sum() / (a | b).sum()) for a, b in pairs]
        assert o.iou == pytest.approx(sum(want) / 3, rel=1e-6)
        d = o.density
        assert o.by_chance == pytest.approx(d * d / (2 * d - d * d), rel=1e-6)
    g = torch.Generator().manual_seed(0)
    draws = [
        [sc.Masks({"a": torch.rand(50, 40, generator=g) < 0.2, "b": torch.rand(30, generator=g) < 0.9})] * 1
        for _ in range(2)
    ]
    a, b = draws[0][0], draws[1][0]
    assert iou_by_chance(a, b) == pytest.approx(a.iou(b), abs=0.03)
    assert sc.overlaps(TicketTable(()), tmp_path) == []


def row(branch: str, level: int, seed: int, accuracy: float) -> Finished:
    log = [(9, {"loss": 0.5}), (19, {"loss": 0.2}), (29, {"loss": 0.3})]
    layers = {"a.weight": 0.5**level}
    return Finished(
        f"{branch}{level}{seed}", {}, branch, level, seed, 0.5**level, layers, {"accuracy": accuracy}, log
    )


def test_intervals_are_student_t_s() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for n in (2, 3, 5, 10, 40):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).double().tolist()
        want = scipy.t.interval(0.95, n - 1, sum(values) / n, scipy.sem(values))
        assert confidence(values) == pytest.approx(want, rel=1e-4)
    assert all(math.isnan(v) for v in confidence([1.0]))


def test_the_table(tmp_path: Path) -> None:
    table = TicketTable(
        tuple(row("ticket", n, s, 0.9 - 0.1 * n + 0.01 * s) for n in (0, 1) for s in (0, 1, 2))
    )
    dense, first = table.summary()
    assert (
        (dense.mean, first.mean) == pytest.approx((0.91, 0.81)) and dense.seeds == 3 and first.density == 0.5
    )
    assert table.summary("early_stop")[0].mean == 19 and table.values("ticket", 1) == pytest.approx(
        [0.8, 0.81, 0.82]
    )
    assert "100.00 %" in str(table) and "91.00 ±2.48" in str(table)
    table.csv(tmp_path / "t.csv")
    lines = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [float(r["accuracy"]) for r in lines] == [r.values["accuracy"] for r in table]
    assert lines[0]["early_stop"] == "19" and lines[4]["seed"] == "1"


def test_pages_show_all_there_is(tmp_path: Path) -> None:
    run = noisy(controls=[Twin(), sc.Reinitialised()], levels=2)
    table = run(tmp_path / "runs")
    sc.barriers(run, tmp_path / "runs", points=5)
    sc.barriers(run, tmp_path / "runs", points=3)
    plot_tickets(table, tmp_path / "runs", tmp_path / "out", "a <name>")
    page = (tmp_path / "out" / "tickets.html").read_text()
    for text in ("Linear connectivity", "What tickets have in common", "Early stopping", "a &lt;name&gt;"):
        assert text in page
    assert (tmp_path / "out" / "tickets.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "tickets.csv").read_text().splitlines()) == 1 + len(table)
    plain = TicketTable((row("ticket", 0, 0, 0.9), row("ticket", 1, 0, 0.8)))
    assert "Layers" in ticket_page(plain) and "compared" in compare_page({"x": plain, "y": table})
    with pytest.raises(ValueError, match="No training"):
        ticket_page(TicketTable(()))
    odd = row("ticket", 0, 0, 0.9)
    odd.values = {"error": 0.1}
    with pytest.raises(ValueError, match="no value named accuracy"):
        ticket_page(TicketTable((odd,)))


@pytest.mark.slow
def test_the_demo_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from secateur.ticket_demo import experiment

    run = experiment(range(2)).but(levels=3, rate=0.7)
    table = run(tmp_path)
    assert len(table) == 2 * (2 + 3 * 4)
    last = {b: sum(table.values(b, 3)) / 2 for b in table.branches}
    assert last["ticket"] > last["random"] and sum(table.values("ticket", 0)) / 2 > 0.94
    assert json.dumps(run.settings(run.jobs()[-1]))
    assert isinstance(run, Lottery) and Noisy and fit and net
