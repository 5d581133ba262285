"""Every example runs as a script, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, *words: object) -> str:
    call = [sys.executable, EXAMPLES / name, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the other workers fill the other cores
    done = subprocess.run(
        list(map(str, call)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits(tmp_path: Path) -> None:
    printed = run(tmp_path, "digits.py").splitlines()
    dense, pruned, tuned = (float(line.split()[-1]) for line in printed[:3])
    assert dense > 0.88 and tuned > dense - 0.03 and tuned > pruned
    assert json.loads((tmp_path / "pruned-digits" / "report.json").read_text())["totals"]["sparsity"] == (
        pytest.approx(0.9, abs=1e-4)
    )


@pytest.mark.realdata("stories260k", "tinyshakespeare")
def test_huggingface(tmp_path: Path, data_root: Path) -> None:
    text = data_root / "tinyshakespeare" / "input.txt"
    (tmp_path / "text.txt").write_text(text.read_text()[:20_000])
    printed = run(tmp_path, "huggingface.py", data_root / "stories260k", "text.txt")
    assert "2:4" in printed or "NM(n=2, m=4)" in printed
    assert "Once upon a time" in printed


@pytest.mark.realdata("stories260k", "tinystories")
@pytest.mark.slow
def test_sparse_finetune(tmp_path: Path, data_root: Path) -> None:
    texts = json.loads((data_root / "tinystories" / "stories.json").read_text())
    (tmp_path / "texts.json").write_text(json.dumps(texts[:150]))
    printed = run(tmp_path, "sparse_finetune.py", data_root / "stories260k", "texts.json", 16)
    figures = [float(line.split()[-1]) for line in printed.splitlines()[:7]]
    dense, pruned, tuned, held, held_merged, free, free_merged = figures
    assert dense < tuned < 0.5 * pruned and held < 0.5 * pruned
    assert held_merged == pytest.approx(held, rel=1e-3)  # what was trained is what is merged
    assert free < held and free_merged > 1.2 * held
    assert "of their power lay on pruned weights and is lost" in printed
    assert (tmp_path / "tuned" / "masks.safetensors").is_file()


@pytest.mark.slow
def test_train_digits(tmp_path: Path) -> None:
    printed = run(tmp_path, "train_digits.py").splitlines()
    accuracy = {line[:34].strip(): float(line.split()[-1]) for line in printed}
    weights = {line[:34].strip(): int(line[34:].split()[0].replace(",", "")) for line in printed}
    methods = ("gradual magnitude", "movement", "RigL, sparse from the first step", "AC/DC")
    for name in methods:
        assert weights[name] == weights["one shot"] < 0.1 * weights["dense"]
        assert accuracy[name] > max(0.93, accuracy["one shot"] + 0.1)
    report = json.loads((tmp_path / "gradual-digits" / "report.json").read_text())
    assert report["totals"]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert report["history"][-1]["step"] == 600


@pytest.mark.realdata("stories260k", "tinystories")
@pytest.mark.slow
def test_train_huggingface(tmp_path: Path, data_root: Path) -> None:
    texts = json.loads((data_root / "tinystories" / "stories.json").read_text())
    (tmp_path / "texts.json").write_text(json.dumps(texts[:250]))
    printed = run(tmp_path, "train_huggingface.py", data_root / "stories260k", "texts.json", 30)
    dense, pruned = (
        float(line.split()[-1]) for line in printed.splitlines() if "{" not in line and "." in line[-7:]
    )
    assert dense < pruned < 6 * dense
    assert "Once upon a time" in printed and (tmp_path / "pruned" / "masks.safetensors").is_file()


@pytest.mark.slow
def test_tickets(tmp_path: Path) -> None:
    printed = run(tmp_path, "tickets.py")
    last = [float(cell.split()[0]) for cell in re.findall(r"[\d.]+ ±", printed.splitlines()[-3])]
    ticket, twin, by_chance = last
    assert ticket > 90 and twin > 90 and ticket > by_chance
    assert "Highest barrier" in printed
    for name in ("tickets.html", "tickets.png", "tickets.csv"):
        assert (tmp_path / "tickets" / name).is_file()


@pytest.mark.slow
def test_shrink_digits(tmp_path: Path) -> None:
    printed = run(tmp_path, "shrink_digits.py")
    figures = dict(
        re.findall(r"^(dense|a quarter left|after fine-tuning) +(\d\.\d+)$", printed, flags=re.MULTILINE)
    )
    dense, tuned = float(figures["dense"]), float(figures["after fine-tuning"])
    assert dense > 0.94 and tuned > dense - 0.02
    report = json.loads((tmp_path / "small-digits" / "report.json").read_text())
    assert 0.24 < report["after"]["macs"] / report["before"]["macs"] <= 0.25


@pytest.mark.realdata("stories260k", "tinyshakespeare")
@pytest.mark.slow
def test_shrink_huggingface(tmp_path: Path, data_root: Path) -> None:
    text = data_root / "tinyshakespeare" / "input.txt"
    (tmp_path / "text.txt").write_text(text.read_text()[:20_000])
    printed = run(tmp_path, "shrink_huggingface.py", data_root / "stories260k", "text.txt")
    figures = dict(
        re.findall(r"^(dense|without units|without a block) +(\d\.\d+)$", printed, flags=re.MULTILINE)
    )
    assert len(figures) == 3 and float(figures["without units"]) < float(figures["dense"]) + 0.5
    assert "Once upon a time" in printed


@pytest.mark.realdata("stories260k", "tinyshakespeare")
def test_sparse_cpu(tmp_path: Path, data_root: Path) -> None:
    text = data_root / "tinyshakespeare" / "input.txt"
    (tmp_path / "text.txt").write_text(text.read_text()[:20_000])
    printed = run(tmp_path, "sparse_cpu.py", data_root / "stories260k", "text.txt", 0.9)
    assert "each token after it" in printed and "Once upon a time" in printed
    sizes = re.search(r"dense (.*) MB, pruned (.*) MB, fast (.*) MB", printed)
    assert sizes is not None
    dense, pruned, fast = map(float, sizes.groups())
    assert pruned < 0.5 * dense and fast <= 1.1 * dense
