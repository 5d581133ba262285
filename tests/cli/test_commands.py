"""The commands, run in this process as a user would type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc

STORIES = "stories260k"
Run = Callable[..., int]


def zeros(folder: Path) -> tuple[int, int]:
    """Zeros and entries of the projections."""
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith("proj.weight")}
    return sum(int((t == 0).sum()) for t in tensors.values()), sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize(
    ("options", "sparsity"),
    [
        (["--sparsity", 0.5], 0.5),
        (["--pattern", "2:4"], 0.5),
        (["--sparsity", 0.7, "--allocation", "global"], 0.7),
        (["--sparsity", 0.25, "--pattern", "4x2", "--allocation", "erk"], 0.25),
        (["--sparsity", 0.6, "--method", "random", "--pattern", "row"], 0.6),
    ],
)
def test_prune_writes_a_model_with_the_promised_zeros(
    llama: Path, tmp_path: Path, run: Run, options: list[object], sparsity: float
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert run("prune", llama, "--out", out, *options) == 0
    found, entries = zeros(out)
    unit = 8 if "4x2" in options else 1
    assert found == int(sparsity * entries / unit + 0.5) * unit
    model = AutoModelForCausalLM.from_pretrained(out)
    sc.Masks.load(out / "masks.safetensors").check(model)
    report = json.loads((out / "report.json").read_text())
    assert report["totals"]["removed"] == found
    assert report["before"]["latency"]["median"] > 0
    assert any("output head" in s["reason"] or "embedding" in s["reason"] for s in report["skipped"])
    page = (out / "report.html").read_text()
    assert "model.layers.0.self_attn.q_proj.weight" in page and len(page) < 1_000_000
    assert sc.load(out) is not None


def test_two_to_four_holds_in_every_group(llama: Path, tmp_path: Path, run: Run) -> None:
    assert run("prune", llama, "--out", tmp_path / "out", "--pattern", "2:4") == 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith("proj.weight"):
            assert ((tensor.view(-1, 4) != 0).sum(1) == 2).all(), name


@pytest.mark.realdata(STORIES, "tinystories")
@pytest.mark.parametrize("method", ["wanda", "taylor", "obd", "sparsegpt", "alps"])
def test_prune_with_data(data_root: Path, tmp_path: Path, run: Run, method: str) -> None:
    stories = json.loads((data_root / "tinystories" / "stories.json").read_text())
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps(stories[:8]))
    test.write_text(json.dumps(stories[600:604]))
    out = tmp_path / "out"
    status = run("prune", data_root / STORIES, "--out", out, "--method", method, "--sparsity", 0.3,
        "--data", train, "--eval", test, "--length", 128,
    )  # fmt: skip
    assert status == 0
    note = next(n for n in json.loads((out / "report.json").read_text())["notes"] if "Mean loss" in n)
    before, after = (float(part.split()[0]) for part in note.split(": ")[1].split(", ")[:2])
    assert before < after < before + 0.6, "30 % should cost something, and not much"
    assert (out / "tokenizer.json").is_file() or (out / "tokenizer.model").is_file()
    errors = [layer["error"] for layer in json.loads((out / "report.json").read_text())["layers"]]
    solved = method in ("sparsegpt", "alps")
    assert all(e is not None and 0 < e < 0.2 for e in errors) if solved else set(errors) == {None}
    assert (
        "of the layer&#x27;s output" in (out / "report.html").read_text().replace("&#39;", "&#x27;")
    ) == solved


def test_inspect_prints_json_and_writes_a_page(
    llama: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", llama, "--json", "--out", tmp_path) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "inspect.json").read_text())
    names = [layer["name"] for layer in printed["layers"]]
    assert len(names) == 21 and "model.layers.1.mlp.down_proj.weight" in names
    assert "down_proj" in (tmp_path / "inspect.html").read_text()
    assert (tmp_path / "weights.svg").read_text().startswith("<")


@pytest.mark.realdata(STORIES, "tinystories")
def test_rounds_measure_anew(data_root: Path, tmp_path: Path, run: Run) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(json.loads((data_root / "tinystories" / "stories.json").read_text())[:2]))
    words = [
        "prune",
        data_root / STORIES,
        "--method",
        "taylor",
        "--sparsity",
        0.6,
        "--data",
        data,
        "--length",
        64,
    ]
    found = []
    for rounds in (1, 3):
        assert run(*words, "--rounds", rounds, "--out", tmp_path / f"{rounds}") == 0
        found.append(sc.Masks.load(tmp_path / f"{rounds}" / "masks.safetensors"))
    assert found[0].kept == found[1].kept and found[0] != found[1]


@pytest.mark.realdata(STORIES, "tinystories")
def test_sensitivity_measures_every_layer(data_root: Path, tmp_path: Path, run: Run) -> None:
    stories = json.loads((data_root / "tinystories" / "stories.json").read_text())
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": s}) for s in stories[:4]))
    words = ["sensitivity", data_root / STORIES, "--data", data, "--out", tmp_path / "out", "--length", 64]
    assert run(*words, "--sparsities", "0.5,0.9", "--include", "model.layers.0.*") == 0
    found = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert len(found["layers"]) == 7
    assert "model.layers.0.mlp.up_proj.weight" in (tmp_path / "out" / "sensitivity.html").read_text()


def _no_model(tmp_path: Path, llama: Path) -> list[object]:
    return ["prune", tmp_path, "--sparsity", 0.5]


def _missing(tmp_path: Path, llama: Path) -> list[object]:
    return ["prune", tmp_path / "nowhere", "--sparsity", 0.5]


def _corrupt(tmp_path: Path, llama: Path) -> list[object]:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    (folder / "config.json").write_text((llama / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:1000])
    return ["prune", folder, "--sparsity", 0.5]


def _no_data(tmp_path: Path, llama: Path) -> list[object]:
    return ["prune", llama, "--sparsity", 0.5, "--method", "wanda"]


def _not_a_data_file(tmp_path: Path, llama: Path) -> list[object]:
    return ["prune", llama, "--sparsity", 0.5, "--method", "wanda", "--data", tmp_path / "no.txt"]


def _odd_tensors(tmp_path: Path, llama: Path) -> list[object]:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, tmp_path / "d.safetensors")
    return ["prune", llama, "--sparsity", 0.5, "--method", "wanda", "--data", tmp_path / "d.safetensors"]


def _own_folder(tmp_path: Path, llama: Path) -> list[object]:
    return ["prune", llama, "--sparsity", 0.5, "--out", llama]


def _occupied(tmp_path: Path, llama: Path) -> list[object]:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    return ["prune", llama, "--sparsity", 0.5, "--out", tmp_path / "full"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, m: ["prune", m, "--sparsity", 1.5], "between 0 and 1"),
        (lambda t, m: ["prune", m], "--sparsity is needed"),
        (lambda t, m: ["prune", m, "--sparsity", 0.3, "--pattern", "2:4"], "at least 0.5"),
        (lambda t, m: ["prune", m, "--sparsity", 0.5, "--pattern", "5:7"], "multiple of 7"),
        (lambda t, m: ["prune", m, "--sparsity", 0.5, "--pattern", "banana"], "banana"),
        (lambda t, m: ["prune", m, "--sparsity", 0.5, "--include", "no.such.*"], "no.such"),
        (lambda t, m: ["sensitivity", m, "--data", t / "no.txt"], "no.txt"),
        (lambda t, m: ["sensitivity", m, "--data", t / "no.txt", "--sparsities", "x"], "list of numbers"),
        (_missing, "nowhere"),
        (_no_model, "config.json"),
        (_corrupt, "model.safetensors"),
        (_no_data, "batches"),
        (_not_a_data_file, "no data file"),
        (_odd_tensors, "first dimension"),
        (_own_folder, "own folder"),
        (_occupied, "choose another"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_result(
    llama: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    call: object,
    words: str,
) -> None:
    given = call(tmp_path, llama)  # type: ignore[operator]
    before = (llama / "model.safetensors").read_bytes()
    out = tmp_path / "out"
    if "--out" not in given:
        given += ["--out", out]
    assert run(*given) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("Error:") and words in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert not out.exists()
    assert (llama / "model.safetensors").read_bytes() == before


def test_help_and_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == sc.__version__
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("demo", "inspect", "prune", "sensitivity"))
