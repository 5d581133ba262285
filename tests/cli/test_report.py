"""`secateur report`: the page of a model that was saved from Python."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc

Run = Callable[..., int]


def test_the_page_of_a_saved_model(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    folder, page = tmp_path / "out", tmp_path / "out" / "report.html"
    sc.save(model, folder, report=sc.prune_(model, sc.Magnitude(), 0.5))
    assert run("report", folder) == 0
    text = page.read_text()
    assert "Pruning report" in text and "0.weight" in text
    assert "criterion Magnitude(" in " ".join(capsys.readouterr().out.split())
    page.write_text("mine")
    assert run("report", folder) == 0
    assert page.read_text() == "mine" and "Give --out" in capsys.readouterr().out
    assert run("report", folder / "report.json", "--out", tmp_path / "p.html") == 0
    assert (tmp_path / "p.html").read_text() == text
    sc.load(folder, model=nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)))  # still whole
    assert run("report", tmp_path) != 0
    assert "save(model, folder, report=report)" in " ".join(capsys.readouterr().err.split())
    assert run("report", folder, "--out", tmp_path / "no" / "p.html") != 0
    assert torch.isfinite(model(torch.zeros(1, 6))).all()
