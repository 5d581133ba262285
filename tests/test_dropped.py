"""Dropping the blocks of least influence, with a report."""

from __future__ import annotations

import copy
import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.shrink_page import drop_page


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.up(x).relu())


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(s) for s in (1.0, 0.01, 0.5, 0.02, 0.8)))


def test_the_blocks_of_least_influence_go_and_the_report_says_all() -> None:
    model = _model()
    dense, x = copy.deepcopy(model), torch.randn(4, 8)
    report = sc.drop_least_(model, 2, x, [torch.randn(32, 8)])
    assert set(report.record.dropped) == {"1", "3"} and len(model) == 3
    assert min(report.influence, key=report.influence.__getitem__) in report.record.dropped
    with torch.no_grad():
        assert torch.equal(model(x), dense[4](dense[2](dense[0](x))))
    size = sum(p.numel() for p in dense.parameters())
    assert (report.before.parameters, report.after.parameters) == (size, size * 3 // 5)
    calls = [{t.name: t.calls for t in times} for times in (report.operators_before, report.operators_after)]
    assert (calls[0]["addmm"], calls[1]["addmm"]) == (10, 6)
    shown = str(report)
    assert shown.count("dropped") == 2 and "parameters" in shown
    report.record.undo()
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))


def test_files_hold_the_report_and_do_the_same_again(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(4, 8)
    dense = copy.deepcopy(model)
    report = sc.drop_least_(model, 1, x, [torch.randn(32, 8)])
    sc.save(model, tmp_path / "small", report=report)
    data = json.loads((tmp_path / "small" / "report.json").read_text())
    assert data["settings"] == {"dropped": "1 of 5 blocks", "by": "block influence"}
    assert data["influence"] == dict(report.influence) and "record" not in data
    again = sc.load(tmp_path / "small", dense)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["record"]["dropped"] == [*report.record.dropped]


def test_the_page_names_every_block() -> None:
    model, x = _model(), torch.randn(4, 8)
    report = sc.drop_least_(model, 2, x, [torch.randn(32, 8)])
    html = drop_page(report)
    text = unescape(re.sub(r"<[^>]+>", "|", re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)))
    cells = [cell.strip() for cell in text.split("|") if cell.strip()]
    for name, value in report.influence.items():
        i = cells.index(f"{value:.4g}")
        assert cells[i - 1] == name
        assert (cells[i + 1] == "dropped") == (name in report.record.dropped)
    assert "Where the time goes" in cells and "2 of 5" in cells
    assert drop_page(report) == html


def test_nothing_is_changed_where_it_cannot_be_done() -> None:
    model, x = _model(), torch.randn(4, 8)
    with pytest.raises(sc.SelectionError):
        sc.drop_least_(model, 5, x, [torch.randn(32, 8)])
    with pytest.raises(sc.StatsError):
        sc.drop_least_(model, 1, x, [])
    assert len(model) == 5
