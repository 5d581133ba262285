"""Pretrained models made smaller: what is promised on real data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from benchmarks import realdata


@pytest.mark.realdata("cifar10_jpeg", "resnet_cifar10")
def test_resnet20_keeps_more_after_repair_than_after_plain_removal() -> None:
    images, labels = realdata.cifar10("test", 1000)
    batches = realdata.calibration("cifar10", 256, 64)
    found = {}
    for how in (None, "parallel"):
        model = realdata.resnet20()
        dense = sc.measure(model, images[:1]).macs
        report = sc.shrink_(
            model,
            images[:1],
            sc.Budget.macs(1 / 1.5),
            batches=batches,
            loss=F.cross_entropy,
            repair=how,  # type: ignore[arg-type]
        )
        assert sc.measure(model, images[:1]).macs == report.got <= dense / 1.5  # type: ignore[operator]
        assert report.check is not None and report.check.ok and report.check.change > 0.1
        found[how] = realdata.accuracy(model, images, labels)
    assert found["parallel"] > found[None] + 0.1 and found["parallel"] > 0.6


@pytest.mark.realdata("minilm_l6", "stsb")
@pytest.mark.slow
def test_minilm_without_a_fifth_of_its_heads() -> None:
    encoder = realdata.minilm()
    model = realdata.StsModel(encoder)
    batches = realdata.calibration("stsb", 32, 8)
    dense = realdata.sts_spearman(encoder, "dev")
    report = sc.shrink_(
        model,
        (batches[0][0],),
        sc.Budget.params(0.999),
        criterion=sc.HeadImportance(),
        scope=sc.Global(),
        kinds="heads",
        batches=batches,
        loss=realdata.sts_loss,
        sparsity={"heads": 0.2},
    )
    heads = [g for g in report.groups if g.kind == "heads"]
    assert len(heads) == 6 and [g.kept for g in heads] == [10] * 6  # 9.6 of 12: the nearest
    assert report.got <= report.asked and report.check is not None and report.check.ok
    assert realdata.sts_spearman(encoder, "dev") > dense - 0.03


@pytest.mark.realdata("stories260k", "tinystories")
def test_stories260k_is_shrunk_in_every_kind_of_group() -> None:
    batches: list[Any] = [{"input_ids": ids} for ids, _ in realdata.calibration("stories", 24, 4)]
    example = {"input_ids": torch.arange(64)[None]}
    model = realdata.stories260k()
    report = sc.shrink_(model, example, sc.Budget.memory(0.8, batch=4, context=512), batches=batches)
    assert report.got <= report.asked and report.check is not None and report.check.ok
    assert realdata.stories_nll(model, 16) < 2.6  # 1.45 of the dense model, 6.2 of one that guesses
    kinds = {g.kind for g in report.groups if g.kept < g.size}
    assert {"neurons", "kv_groups"} <= kinds
    out = model.generate(torch.tensor([[1]]), max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 9)
