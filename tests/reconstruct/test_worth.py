"""Repair is kept only where the whole model says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.reconstruct.worth import Gain

NAN = float("nan")


def _model(norm: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 8)]
    if norm:
        layers.append(nn.BatchNorm1d(8))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3)).eval()
    return model, torch.randn(64, 6) @ torch.randn(6, 6)


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("repair", ["parallel", "sequential"])
def test_repair_that_makes_the_loss_larger_is_left_out(norm: bool, repair: Any) -> None:
    model, x = _model(norm)
    twin = copy.deepcopy(model)
    sc.shrink_(twin, x, sc.Budget.params(0.6), repair=None)
    if norm:
        sc.reestimate_batchnorm_(twin, [x[i : i + 16] for i in range(0, 64, 16)])
    with torch.no_grad():
        wanted = twin(x)
    smaller = copy.deepcopy(model)
    report = sc.shrink_(
        smaller, x, sc.Budget.params(0.6), batches=_batches(x, wanted), loss=F.mse_loss, repair=repair
    )
    (gain,) = report.gains
    assert not gain.kept and gain.plain < 1e-10 < gain.repaired and gain.what == "loss"
    assert f"Repair was left out: {gain}." in report.notes and "left out" in str(report)
    for (name, p), q in zip(smaller.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    report.undo()
    for (name, p), q in zip(smaller.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("norm", [False, True])
def test_repair_that_makes_the_loss_smaller_is_kept(norm: bool) -> None:
    model, x = _model(norm)
    with torch.no_grad():
        batches = _batches(x, model(x))
    smaller = copy.deepcopy(model)
    report = sc.shrink_(smaller, x, sc.Budget.params(0.6), batches=batches, loss=F.mse_loss)
    (gain,) = report.gains
    assert gain.kept and gain.repaired < gain.plain
    with torch.no_grad():
        lost = float(F.mse_loss(smaller(x), model(x)))
    assert gain.repaired == pytest.approx(lost, rel=1e-4)
    assert report.to_dict()["gains"] == [
        {"what": "loss", "plain": gain.plain, "repaired": gain.repaired, "kept": True}
    ]
    assert f"Repair: {gain}." in str(report).replace("\n  ", " ").replace("  ", " ")


def test_without_a_loss_outputs_are_compared() -> None:
    model, x = _model(norm=False)
    batches = [x[:32], x[32:]]
    plain, repaired = copy.deepcopy(model), copy.deepcopy(model)
    sc.shrink_(plain, x, sc.Budget.params(0.6), repair=None)
    report = sc.shrink_(repaired, x, sc.Budget.params(0.6), batches=batches)
    (gain,) = report.gains
    assert gain.what == "squared error of the output"
    with torch.no_grad():
        whole = model(x).square().sum()
        errors = [float((m(x) - model(x)).square().sum() / whole) for m in (plain, repaired)]
    assert [gain.plain, gain.repaired] == pytest.approx(errors, rel=1e-3)


def test_every_step_is_judged() -> None:
    model, x = _model(norm=False)
    report = sc.shrink_(model, x, sc.Budget.params(0.5), batches=[x], steps=3)
    assert len(report.gains) == len(report.repairs) == 3


def test_nothing_is_judged_where_nothing_was_repaired() -> None:
    model, x = _model(norm=False)
    assert sc.shrink_(model, x, sc.Budget.params(0.6), batches=[x], repair=None).gains == ()


@pytest.mark.parametrize(
    ("plain", "repaired", "kept"), [(1.0, NAN, False), (NAN, 1.0, True), (1.0, 1.0, True)]
)
def test_what_is_not_a_number_is_never_the_better_one(plain: float, repaired: float, kept: bool) -> None:
    assert Gain("loss", plain, repaired).kept == kept
