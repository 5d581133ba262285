"""`secateur eval` against published numbers and a plain loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc

STORIES = "stories260k"
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.mark.realdata(STORIES, "tinystories")
def test_the_published_perplexity_of_stories260k(
    data_root: Path, tmp_path: Path, run: Run, capsys: Capture
) -> None:
    stories = json.loads((data_root / "tinystories" / "stories.json").read_text())
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(stories[600:800]))
    out = tmp_path / "found.json"
    status = run("eval", data_root / STORIES, "--data", file, "--length", 512, "--json", "--out", out)
    assert status == 0
    found = json.loads(capsys.readouterr().out)
    # From the README of the data: each story alone, summed loss over summed tokens.
    assert found["perplexity"] == pytest.approx(4.266, abs=5e-4)
    assert found["loss"] == pytest.approx(1.451, abs=5e-4)
    assert found["examples"] == 200 and found["task"] == "text-generation"
    assert "texts of unlike length" in found["protocol"]
    assert json.loads(out.read_text()) == found


@pytest.mark.realdata(STORIES, "tinystories")
def test_a_text_is_cut_into_windows(data_root: Path, tmp_path: Path, run: Run, capsys: Capture) -> None:
    from transformers import AutoTokenizer

    story = json.loads((data_root / "tinystories" / "stories.json").read_text())[600]
    file = tmp_path / "story.txt"
    file.write_text(story)
    assert run("eval", data_root / STORIES, "--data", file, "--length", 32, "--samples", 3) == 0
    shown = capsys.readouterr().out
    ids = torch.tensor(AutoTokenizer.from_pretrained(data_root / STORIES)(story)["input_ids"][:96]).view(
        3, 32
    )
    model = sc.load(data_root / STORIES)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert f"perplexity {math.exp(loss):.4f}" in shown and f"{loss:.6f}" in shown
    assert "93 tokens predicted in 3 examples: story.txt, windows of 32 tokens" in shown


def test_labels_are_counted_where_they_are(llama: Path, tokens: Path, run: Run, capsys: Capture) -> None:
    tensors = load_file(tokens)
    tensors["labels"][:, :10] = -100
    file = tokens.with_name("labelled.safetensors")
    save_file(tensors, file)
    assert run("eval", llama, "--data", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 8 * 6


def test_bad_input_is_one_sentence(
    llama: Path, tokens: Path, tmp_path: Path, run: Run, capsys: Capture
) -> None:
    file = tmp_path / "inputs.safetensors"
    save_file({"input_ids": load_file(tokens)["input_ids"]}, file)
    for words, match in (
        ((llama, "--data", "missing.txt"), "no data file"),
        ((llama, "--data", tokens, "--length", 1), "--length at least 2"),
        ((llama, "--data", file), "no loss to measure"),
        ((tmp_path, "--data", tokens), "has no config.json"),
    ):
        assert run("eval", *words) == 1
        said = capsys.readouterr().err
        assert match in said.replace("\n", " ") and "Traceback" not in said
