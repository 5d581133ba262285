"""Calibration data that a model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.cli.data import SELF, Data, read_data

STORIES = "stories260k"
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(llama: Path) -> Any:
    return sc.load(llama)


def own(
    model: Any, samples: int = 20, length: int = 12, seed: int | None = None
) -> tuple[torch.Tensor, Data]:
    data = read_data(SELF, Path("nowhere"), model, "text-generation", samples, length, seed)
    return torch.cat([batch["input_ids"] for batch in data.batches]), data


def test_as_many_tokens_as_asked_from_the_vocabulary_again_and_again(model: Any) -> None:
    state = torch.get_rng_state()
    ids, data = own(model)
    assert ids.shape == (20, 12) and int(ids.min()) >= 0 and int(ids.max()) < 64
    assert set(ids[:, 0].tolist()) == {model.config.bos_token_id}
    assert torch.equal(own(model)[0], ids) and torch.equal(own(model, seed=0)[0], ids)
    assert not torch.equal(own(model, seed=1)[0], ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert data.source is None and data.loss is not None
    assert data.notes == (
        "The data was written by the model itself: 20 texts of 12 tokens from its beginning-of-text token 1, "
        "temperature 1, seed 0.",
    )
    assert own(model, 2, 100)[0].shape == (2, 64), "no more than the model's positions"


def test_the_settings_of_the_model_do_not_bend_its_distribution(model: Any) -> None:
    plain = own(model)[0]
    model.generation_config.update(
        do_sample=False,
        top_k=1,
        temperature=0.01,
        repetition_penalty=9.0,
        max_length=3,
        eos_token_id=list(range(64)),
    )
    kept = model.generation_config
    assert torch.equal(own(model)[0], plain)
    assert model.generation_config is kept


@pytest.mark.parametrize("scale", [1, 6])
def test_tokens_are_drawn_with_the_models_probabilities(model: Any, scale: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # near uniform as it is, far from it otherwise
        ids = own(model, samples=600, length=8)[0]
        log_p = F.log_softmax(model(ids).logits[:, :-1], -1)
    drawn = log_p.gather(-1, ids[:, 1:, None])
    entropy = -(log_p.exp() * log_p).sum(-1)
    rare = log_p.exp().sort(-1).values[..., :14].sum(-1)  # what the usual top 50 would leave out
    is_rare = ((log_p > drawn).sum(-1) >= 50).double()
    for got, expected in ((-drawn.squeeze(-1), entropy), (is_rare, rare)):
        difference = (got - expected).double()
        assert abs(float(difference.mean())) <= 4 * float(difference.std()) / difference.numel() ** 0.5


def test_without_a_beginning_it_begins_anywhere(model: Any) -> None:
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    ids, data = own(model, samples=40)
    assert len(set(ids[:, 0].tolist())) > 20
    assert torch.equal(own(model, samples=40)[0], ids) and "from random tokens" in data.notes[0]


@pytest.mark.realdata(STORIES)
def test_a_story_writer_writes_stories(data_root: Path) -> None:
    from transformers import AutoTokenizer

    model: Any = sc.load(data_root / STORIES)
    ids, data = own(model, samples=8, length=96)
    text = " ".join(AutoTokenizer.from_pretrained(data_root / STORIES).batch_decode(ids))
    assert "Once upon a time" in text
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert 0.8 < loss < 2.2, "1.45 on stories by people"
    assert data.loss is not None


def test_pruning_by_what_the_model_writes(llama: Path, tmp_path: Path, run: Run) -> None:
    words = ["--method", "wanda", "--sparsity", 0.5, "--data", "self", "--samples", 8, "--length", 16]
    assert run("prune", llama, "--out", tmp_path / "out", *words) == 0
    model = sc.load(llama)
    batches = own(model, samples=8, length=16)[1].batches
    sc.prune_(model, sc.Wanda(), 0.5, pattern=sc.PerRow(), batches=batches)
    pruned = sc.load(tmp_path / "out")
    for (name, mine), theirs in zip(model.named_parameters(), pruned.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_who_cannot_write_is_told_so(llama: Path, tmp_path: Path, run: Run, capsys: Capture) -> None:
    from transformers import BertConfig, BertForMaskedLM

    bert = tmp_path / "bert"
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(config).save_pretrained(bert)
    broken = tmp_path / "broken"
    model: Any = sc.load(llama)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    for folder, said in ((bert, "this is one for fill-mask"), (broken, "cannot write its own")):
        words = ["--method", "wanda", "--sparsity", 0.5, "--out", tmp_path / "out", "--length", 8]
        assert run("prune", folder, "--data", "self", *words) == 1
        assert said in " ".join(capsys.readouterr().err.split())
    assert run("eval", llama, "--data", "self") == 1
    assert "no test of it" in capsys.readouterr().err
