"""The page of structured pruning says what the report says."""

import re
from html import unescape

import torch
from torch import nn

import secateur as sc
from secateur.shrink_page import shrink_page


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (8, 12, 20)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def shown(html):
    """Texts of the page without markup, scripts and styles; those of figures too."""
    plain = re.sub(r"<[^>]+>", "|", re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL))
    return re.sub(r"\s+", " ", unescape(plain))


def page(**settings):
    torch.manual_seed(0)
    model = Net()
    report = sc.shrink_(model, torch.randn(2, 6), sc.Budget.params(0.6), **settings)
    return report, shown(shrink_page(report))


def test_every_group_cost_and_reason_is_there():
    report, text = page(batches=[torch.randn(9, 6) for _ in range(3)])
    cells = [cell.strip() for cell in text.split("|")]
    for g in report.groups:
        i = cells.index(g.name)
        row = [c for c in cells[i + 1 : i + 12] if c]
        assert row[:2] == [str(g.size), str(g.kept)] and g.kept < g.size
    for a, b in [
        (report.before.dense_bytes, report.after.dense_bytes),
        (report.before.parameters, report.after.parameters),
        (report.before.macs, report.after.macs),
    ]:
        assert f"{a:,}" in cells and f"{b:,}" in cells
    assert {"dense", "smaller", "left"} <= set(cells)
    assert "equal: error" in text
    assert report.frozen and all(reason in text for reason, _ in report.frozen)
    repaired = {layer.name for repair in report.repairs for layer in repair.layers}
    assert repaired == {f"layers.{i}.2.weight" for i in range(3)} and repaired <= set(cells)


def test_bars_of_different_groups_have_different_names():
    _, text = page()
    assert all(f"{i}.0 neurons" in text for i in range(3))


def test_what_was_not_proved_is_said():
    _, text = page(check=False)
    assert "Not compared with the dense model" in text and "check=False" in text
