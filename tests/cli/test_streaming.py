"""`secateur prune` block by block: by itself where it can, in memory with the reason where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur as sc
from benchmarks import zoo

Run = Callable[..., int]
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Token ids as calibration data."""
    path = tmp_path / "ids.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, 64, (16, 24), generator=draw)}, path)
    return path


def notes(out: Path) -> list[str]:
    found: list[str] = json.loads((out / "report.json").read_text())["notes"]
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_blocks_are_streamed_with_the_result_of_memory(
    llama: Path, ids: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prune", llama, "--method", "sparsegpt", "--sparsity", 0.5, "--data", ids)
    assert run(*words, "--out", tmp_path / "streamed") == 0
    assert "report.html" in capsys.readouterr().out
    assert run(*words, "--out", tmp_path / "whole", "--in-memory") == 0
    assert any("Pruned block by block" in note for note in notes(tmp_path / "streamed"))
    assert not any("Pruned block by block" in note for note in notes(tmp_path / "whole"))
    streamed, whole = weights(tmp_path / "streamed"), weights(tmp_path / "whole")
    for name, weight in whole.items():
        torch.testing.assert_close(streamed[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    assert "model.layers.0.self_attn.q_proj" in (tmp_path / "streamed" / "report.html").read_text()
    sc.load(tmp_path / "streamed")  # checks sizes and hashes, of the report that was amended, too


def test_reconstruction_and_owl_from_the_command_line(
    llama: Path, ids: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert (
        run(
            "prune",
            llama,
            "--method",
            "alps",
            "--pattern",
            "2:4",
            "--data",
            ids,
            "--out",
            out,
            "--reconstruct",
            1,
        )
        == 0
    )
    report = json.loads((out / "report.json").read_text())
    assert "Reconstruct(epochs=1" in report["settings"]["reconstruct"]
    assert report["settings"]["correction"] == "0.01"
    assert report["totals"]["sparsity"] == 0.5
    assert any("before their block was tuned" in note for note in report["notes"])
    assert any("corrected targets" in note for note in report["notes"])
    assert any("Tuning brought 3 blocks" in note for note in report["notes"])
    more = ("--allocation", "owl", "--sparsity", 0.6)
    assert run("prune", llama, "--method", "alps", "--data", ids, "--out", out, *more) == 0
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert len({layer["asked"] for layer in layers}) > 1
    assert sum(x["removed"] for x in layers) == round(0.6 * sum(x["zeros"] / x["sparsity"] for x in layers))


def test_a_model_that_cannot_be_streamed_is_loaded_and_the_report_says_why(
    ids: Path, tmp_path: Path, run: Run
) -> None:
    model, _, kwargs = zoo.build("transformers/nomic_bert")  # its files hold query, key and value as one
    model.save_pretrained(tmp_path / "joined")
    data = tmp_path / "joined.safetensors"
    save_file({name: value.repeat(4, 1) for name, value in kwargs.items()}, data)
    out = tmp_path / "out"
    words = ("--method", "sparsegpt", "--sparsity", 0.5, "--data", data, "--out", out)
    assert run("prune", tmp_path / "joined", *words) == 0
    assert any(note.startswith("In memory, not block by block") for note in notes(out))
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert len(layers) > 5 and all(layer["sparsity"] == pytest.approx(0.5, abs=1e-3) for layer in layers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "alps", "--sparsity", "0.5"), "--data"),
        (("--method", "magnitude", "--sparsity", "0.5", "--reconstruct", "1"), "only a solver"),
        (("--method", "alps", "--sparsity", "0.5", "--correction", "0", "--data", "IDS"), "above 0"),
        (("--method", "alps", "--sparsity", "0.5", "--data", "nowhere.txt"), "nowhere.txt"),
        (("--method", "alps", "--pattern", "2:7", "--data", "IDS"), "NM(2, 7)"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...],
    message: str,
    llama: Path,
    ids: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(ids) if word == "IDS" else word for word in words]
    assert run("prune", llama, "--out", tmp_path / "out", *given) != 0
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_two_processes_give_one_result(llama: Path, ids: Path, tmp_path: Path) -> None:
    words: list[Any] = [
        "prune",
        llama,
        "--method",
        "sparsegpt",
        "--sparsity",
        0.5,
        "--data",
        ids,
        "--samples",
        16,
    ]
    outs = {}
    for n in (1, 2):
        outs[n] = tmp_path / f"out{n}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
        command += ["-m", "secateur", *words, "--out", outs[n]]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (weights(outs[n]) for n in (1, 2))
    same = [((one[name] == 0) == (two[name] == 0)).float().mean().item() for name in one]
    assert min(same) > 0.98, "rounding of sums in another order decides a few entries"


@pytest.mark.parametrize("how", ["search", "error"])
def test_a_measured_allocation_is_a_file_that_prune_takes(
    llama: Path, ids: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    shares = tmp_path / "shares.json"
    words = ("allocate", llama, "--data", ids, "--sparsity", 0.6, "--how", how, "--out", shares)
    assert run(*words, "--generations", 3, "--step", 0.1, "--work", tmp_path / "work") == 0
    text = capsys.readouterr().out
    assert "uniform" in text
    assert "by error" in text
    measured = sc.Measured.load(shares)
    assert len(set(measured.shares.values())) > 1
    out = tmp_path / "out"
    words = ("prune", llama, "--method", "sparsegpt", "--sparsity", 0.6, "--data", ids, "--out", out)
    assert run(*words, "--allocation", shares) == 0
    report = json.loads((out / "report.json").read_text())
    total = pruned = 0
    for layer in report["layers"]:
        assert layer["sparsity"] == pytest.approx(measured.shares[layer["name"]], abs=1e-3)
        weight = weights(out)[layer["name"]]
        total, pruned = total + weight.numel(), pruned + int((weight == 0).sum())
    assert pruned == round(0.6 * total)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--allocation", "best"), "--allocation is uniform, "),
        (("--allocation", "missing.json"), "missing.json cannot be read as an allocation"),
    ],
)
def test_no_such_allocation(
    llama: Path,
    ids: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    words: Any,
    said: str,
) -> None:
    out = tmp_path / "out"
    words = ("prune", llama, "--method", "sparsegpt", "--sparsity", 0.5, "--data", ids, "--out", out, *words)
    assert run(*words) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_an_allocation_is_refused_where_it_cannot_be_a_file_for_prune(
    llama: Path, ids: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("allocate", llama, "--data", ids, "--sparsity", 0.6)
    assert run(*words, "--out", tmp_path / "shares") == 1
    assert "--out is a .json file" in capsys.readouterr().err
    assert run(*words, "--pattern", "2:4", "--out", tmp_path / "shares.json") == 1
    assert "2" in capsys.readouterr().err
    assert not (tmp_path / "shares.json").exists()
