"""The pages that the commands write, as text and in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur import demo, pages
from secateur.report import write

WRONG = """return [...document.querySelectorAll('svg')].filter(
    s => s.getBoundingClientRect().width < 20).length"""


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def prune_page(net: nn.Module) -> str:
    before = sc.inspect(net)
    report = sc.prune_(net, sc.Magnitude(), 0.6, allocation=sc.global_, example=torch.zeros(8, 32))
    return pages.prune_page(report, before, sc.inspect(net))


def inspect_page(net: nn.Module) -> str:
    return pages.inspect_page(sc.inspect(net))


def sensitivity_page(net: nn.Module) -> str:
    batches = [(torch.randn(16, 32), torch.randint(0, 4, (16,)))]
    return pages.sensitivity_page(sc.sensitivity(net, sc.Wanda(), batches=batches, loss=F.cross_entropy))


def demo_page(net: nn.Module) -> str:
    return demo.page(demo.run(seeds=1))


MAKERS = [prune_page, inspect_page, sensitivity_page]


@pytest.mark.browser
@pytest.mark.parametrize("make", [*MAKERS, pytest.param(demo_page, marks=pytest.mark.slow)])
def test_the_console_is_silent_and_every_picture_is_there(
    browser: Any, net: nn.Module, tmp_path: Path, make: Callable[[nn.Module], str]
) -> None:
    html = make(net)
    assert len(html.encode()) < 1_000_000
    write(tmp_path / "page.html", html)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.querySelectorAll('svg').length") >= 2
    assert browser.execute_script(WRONG) == 0


def test_the_numbers_on_the_page_are_the_report(net: nn.Module) -> None:
    report = sc.prune_(net, sc.Magnitude(), 0.75)
    html = pages.prune_page(report)
    assert f"{report.removed:,} of {report.entries:,}" in html
    for layer in report.layers:
        assert layer.name in html and f"{layer.removed:,}" in html
    assert "part of the output head" in html
    for note in report.notes:
        assert note in html


def test_survivors_are_drawn_at_their_share(net: nn.Module) -> None:
    before = sc.inspect(net)
    sc.prune_(net, sc.Magnitude(), 0.9)
    after = sc.inspect(net)
    edges = before.layers[0].histogram.edges  # type: ignore[union-attr]
    densities = pages._survivors(before.layers[0], after.layers[0])
    assert densities is not None
    mass = sum(d * (b - a) for d, a, b in zip(densities, edges, edges[1:], strict=False))
    alive = before.layers[0].weights - before.layers[0].zeros
    share = (after.layers[0].weights - after.layers[0].zeros) / alive
    assert mass == pytest.approx(share, abs=0.02)
    middle = densities[len(densities) // 2]
    assert middle == 0, "the smallest weights are gone"
