"""`secateur shrink`, run in this process as a user would type it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import secateur as sc

STORIES = "stories260k"
Run = Callable[..., int]
Call = Callable[[Path, Path], list[object]]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_equal_layers_load_with_plain_from_pretrained(llama: Path, tmp_path: Path, run: Run) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    words = ["--params", 0.8, "--kinds", "neurons", "--scope", "local", "--multiple-of", 4]
    assert run("shrink", llama, "--out", out, *words) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size % 4 == 0 and model.config.intermediate_size < 32
    dense = AutoModelForCausalLM.from_pretrained(llama)
    assert parameters(model) <= 0.8 * parameters(dense)
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["parameters"] == parameters(model) == report["got"]
    assert report["check"]["error"] < 1e-4
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, sc.load(out)(ids).logits)


def test_layers_of_different_widths_load_with_secateur_and_not_wrongly_without(
    llama: Path,
    tokens: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    words = ["--macs", 0.7, "--method", "taylor", "--scope", "global", "--data", tokens, "--eval", tokens]
    assert run("shrink", llama, "--out", out, *words) == 0
    assert "sc.load rebuilds it" in " ".join(capsys.readouterr().out.split())
    model = sc.load(out)
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["parameters"] == parameters(model)
    assert report["after"]["macs"] <= 0.7 * report["before"]["macs"]
    assert report["repairs"] and any("Mean loss" in note for note in report["notes"])
    neurons = [g["kept"] for g in report["groups"] if g["kind"] == "neurons"]
    assert [model.get_submodule(f"model.layers.{i}.mlp.up_proj").out_features for i in range(3)] == neurons
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(out)


def test_layers_are_dropped_and_then_the_budget_counts_from_what_is_left(
    llama: Path,
    tokens: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM

    shallow, both = tmp_path / "shallow", tmp_path / "both"
    assert run("shrink", llama, "--out", shallow, "--drop-layers", 1, "--data", tokens) == 0
    assert "Dropped blocks" in (shallow / "report.html").read_text()
    assert len(json.loads((shallow / "report.json").read_text())["influence"]) == 3
    assert "dropped" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(shallow)
    assert model.config.num_hidden_layers == 2 == len(model.model.layers)
    words = ["--drop-layers", 1, "--params", 0.8, "--data", tokens, "--repair", "none"]
    assert run("shrink", llama, "--out", both, *words) == 0
    smaller = sc.load(both)
    assert len(smaller.model.layers) == 2
    assert parameters(smaller) <= 0.8 * parameters(model)
    (dropped,) = json.loads((both / "report.json").read_text())["dropped"]
    assert dropped.startswith("model.layers.")
    assert f"Dropped as a whole: {dropped}." in capsys.readouterr().out
    assert "1 blocks were dropped as a whole." in (both / "report.html").read_text()


def test_memory_counts_the_cache(llama: Path, tmp_path: Path, run: Run) -> None:
    words = ["--memory", 0.7, "--batch", 4, "--context", 256]
    assert run("shrink", llama, "--out", tmp_path / "out", *words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense = sc.load(llama)
    cache = 3 * 2 * 2 * 4 * 4 * 4 * 256  # layers, keys and values, groups, head size, bytes, batch, context
    assert report["asked"] == pytest.approx(0.7 * (4 * parameters(dense) + cache))
    assert report["got"] <= report["asked"]


def test_a_dry_run_says_what_would_go_and_writes_nothing(
    llama: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in llama.iterdir()}
    for words in ([], ["--out", tmp_path / "out"]):
        assert run("shrink", llama, "--params", 0.8, "--dry-run", *words) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            "of the parameters lie in one" in shown and "neurons" in shown and "nothing was written" in shown
        )
    assert not (tmp_path / "out").exists()
    assert {p.name: p.read_bytes() for p in llama.iterdir()} == before


@pytest.mark.realdata(STORIES, "tinystories")
@pytest.mark.slow
def test_a_real_model_stays_good(data_root: Path, tmp_path: Path, run: Run) -> None:
    stories = json.loads((data_root / "tinystories" / "stories.json").read_text())
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps(stories[:24]))
    test.write_text(json.dumps(stories[600:606]))
    losses = {}
    for repair in ("none", "parallel"):
        out = tmp_path / repair
        words = ["--params", 0.85, "--method", "taylor", "--kinds", "neurons", "--repair", repair]
        data = ["--data", train, "--eval", test, "--length", 128]
        assert run("shrink", data_root / STORIES, "--out", out, *words, *data) == 0
        note = next(n for n in json.loads((out / "report.json").read_text())["notes"] if "Mean loss" in n)
        before, losses[repair] = (float(part.split()[0]) for part in note.split(": ")[1].split(", ")[:2])
        assert (out / "tokenizer.json").is_file() or (out / "tokenizer.model").is_file()
    assert before < losses["parallel"] < losses["none"]


# ------ bad input


def _given(**tensors: torch.Tensor) -> Call:
    """A call with data of these tensors."""

    def call(tmp: Path, model: Path) -> list[object]:
        save_file(tensors, tmp / "d.safetensors")
        return [model, "--params", 0.8, "--method", "activation", "--data", tmp / "d.safetensors"]

    return call


def _corrupt(tmp: Path, model: Path) -> list[object]:
    folder = tmp / "corrupt"
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    return [folder, "--params", 0.8]


def _occupied(tmp: Path, model: Path) -> list[object]:
    (tmp / "full").mkdir()
    (tmp / "full" / "thesis.txt").write_text("mine")
    return [model, "--params", 0.8, "--out", tmp / "full"]


BAD: dict[str, tuple[Call, str]] = {
    "no size": (lambda t, m: [m], "Say how small"),
    "two budgets": (lambda t, m: [m, "--params", 0.8, "--macs", 0.8], "One budget at a time"),
    "fraction": (lambda t, m: [m, "--params", 1.5], "above 0 and up to 1"),
    "unreachable": (lambda t, m: [m, "--params", 0.01], "cannot be reached"),
    "kinds": (lambda t, m: [m, "--params", 0.8, "--kinds", "banana"], "No group of the kinds banana"),
    "exclude": (lambda t, m: [m, "--params", 0.8, "--exclude", "no.such.*"], "no.such"),
    "no data": (lambda t, m: [m, "--params", 0.8, "--method", "taylor"], "batches"),
    "no such data": (lambda t, m: [m, "--params", 0.8, "--data", t / "no.txt"], "no data file"),
    "drop without data": (lambda t, m: [m, "--drop-layers", 1], "give it --data"),
    "odd tensors": (_given(a=torch.zeros(2, 3), b=torch.zeros(3)), "first dimension"),
    "other words": (_given(input_ids=torch.full((2, 8), 1000)), "has the token 1000, but the model knows 64"),
    "other arguments": (_given(words=torch.zeros(2, 8)), "does not take the tensors"),
    "other numbers": (_given(input_ids=torch.zeros(2, 8)), "arguments of the model, by name"),
    "criterion": (lambda t, m: [m, "--params", 0.8, "--method", "bn-scale"], "BNScale"),
    "missing": (lambda t, m: [t / "nowhere", "--params", 0.8], "nowhere"),
    "no model": (lambda t, m: [t, "--params", 0.8], "config.json"),
    "corrupt": (_corrupt, "model.safetensors"),
    "own folder": (lambda t, m: [m, "--params", 0.8, "--out", m], "own folder"),
    "occupied": (_occupied, "choose another"),
    "no out": (lambda t, m: [m, "--params", 0.8, "--out"], "--out"),
}


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_no_result(
    llama: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    call: Call,
    words: str,
) -> None:
    given: list[Any] = call(tmp_path, llama)
    before = (llama / "model.safetensors").read_bytes()
    out = tmp_path / "out"
    if given[-1] == "--out":
        given.pop()
    elif "--out" not in given:
        given += ["--out", out]
    assert run("shrink", *given) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("Error:") and words in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert not out.exists()
    assert (llama / "model.safetensors").read_bytes() == before


def test_more_layers_than_there_are(
    llama: Path,
    tokens: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("shrink", llama, "--out", tmp_path / "out", "--drop-layers", 9, "--data", tokens) == 1
    assert capsys.readouterr().err.startswith("Error:")
    assert not (tmp_path / "out").exists()
