"""The embedded main job, at one seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from secateur import demo


@pytest.fixture(scope="module")
def result() -> demo.Demo:
    return demo.run(seeds=1)


def test_every_criterion_at_every_sparsity(result: demo.Demo) -> None:
    assert set(result.criteria) == {*demo.criteria(0), "dense-small"}
    assert len(result.points) == len(result.criteria) * len(demo.SPARSITIES)
    assert result.baseline > 0.95


def test_what_anyone_would_expect_holds(result: demo.Demo) -> None:
    def tuned(name: str, sparsity: float) -> float:
        (value,) = result.values(name, sparsity, tuned=True)
        return value

    assert tuned("magnitude", 0.8) > result.baseline - 0.02
    assert tuned("magnitude", 0.9) > tuned("random", 0.9) + 0.1
    for name in ("magnitude", "Taylor", "OBD (Fisher)", "Wanda", "SynFlow"):
        assert tuned(name, 0.5) > result.baseline - 0.03, name


def test_the_report_counts_exactly(result: demo.Demo) -> None:
    report = result.report
    assert report.removed == int(demo.SHOWN * report.entries + 0.5)
    assert report.after.nonzero <= report.before.nonzero - report.removed + 50


def test_test_images_are_not_training_images() -> None:
    (x, y), (x_test, y_test) = demo.digits()
    assert (len(y), len(y_test)) == (1198, 599)
    again = demo.digits()
    assert torch.equal(x, again[0][0]) and torch.equal(x_test, again[1][0])


def test_folder(result: demo.Demo, tmp_path: Path) -> None:
    demo.write(result, tmp_path / "new" / "folder")
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    data = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert len(data["points"]) == len(result.points)
    assert len(page.encode()) < 1_000_000
    assert page.count("<svg") >= 5
    for name in result.criteria:
        assert name in page
    # A number of the table is the number measured.
    (value,) = result.values("magnitude", 0.8, tuned=True)
    assert re.search(rf"\b{100 * value:.1f}\b", page)
