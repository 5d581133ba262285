"""Finished trainings: found again, never done twice, equal after any interruption; damage is said."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import ArtifactError
from secateur.lottery import Fit, Lottery, Store, TicketTable
from secateur.lottery.experiment import Job
from secateur.lottery.identity import describe
from tests.lottery.helpers import accuracy, fit, net, noisy, task, train_noisy

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import secateur as sc
from tests.lottery.helpers import fit, net, noisy
small = sc.Lottery(net, fit(40), levels=4, seeds=range(3), controls=[sc.Reinitialised()])
for run in (small, noisy(controls=[sc.RandomTicket()])):
    run(sys.argv[1])
"""


def experiments() -> list[Lottery]:
    small = Lottery(net, fit(40), levels=4, seeds=range(3), controls=[sc.Reinitialised()])
    return [small, noisy(controls=[sc.RandomTicket()])]


def facts(table: TicketTable) -> list[object]:
    return [(r.key, r.branch, r.level, r.seed, r.density, r.layers, r.values, r.log, r.steps) for r in table]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_with_the_same_table(kills: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = [facts(run(tmp_path / "whole")) for run in experiments()]
    finally:
        torch.set_num_threads(threads)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).resolve().parents[2])))
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "killed")]
    draw, done, killed = random.Random(kills), 0, 0
    while killed < kills:
        process = subprocess.Popen(command)
        # Wait for it to begin, so that the kill falls into the work.
        before = len(list((tmp_path / "killed").glob("??/*/training.json")))
        while process.poll() is None and len(list((tmp_path / "killed").glob("??/*"))) <= before:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        elif process.wait() == 0:
            break  # through before it could be killed so often
        process.wait()
        now = len(list((tmp_path / "killed").glob("??/*/training.json")))
        assert now >= done  # nothing is lost
        done = now
    assert killed >= min(kills, 2)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("??/*/training.json")}
    subprocess.run(command, check=True)
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())  # nothing is done twice
    store = Store(tmp_path / "killed")
    found = [facts(run.finished(store)) for run in experiments()]
    assert found == whole
    for (key, *_), (other, *_) in zip(whole[0], found[0], strict=True):  # type: ignore[misc]
        assert key == other
    a = Store(tmp_path / "whole")
    for table in whole:
        for key, *_ in table:  # type: ignore[misc]
            ours = store.weights(key)
            assert all(torch.equal(t, ours[n]) for n, t in a.weights(key).items())


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    seen = []

    def train(model: torch.nn.Module, trial: sc.Trial) -> None:
        seen.append((trial.seed, trial.start))
        train_noisy(model, trial)

    def run(**more: object) -> Lottery:
        return Lottery(net, train, **{"evaluate": accuracy, "levels": 1, "seeds": (0,)} | more)  # type: ignore[arg-type]

    run()(tmp_path)
    assert seen == [(0, 0), (0, 0)]
    run()(tmp_path)
    run(levels=2)(tmp_path)
    run(levels=2, seeds=(0, 1))(tmp_path)
    assert len(seen) == 3 + 3
    run(levels=1, seeds=(0,), rewind=sc.rewind_to(5))(tmp_path)  # the dense network is the same
    assert len(seen) == 3 + 3 + 2 and seen[-1] == (0, 5)
    run(levels=1, seeds=(0,), name="other")(tmp_path)
    assert len(seen) == 3 + 3 + 2 + 2
    run(levels=1, seeds=(0,), criterion=sc.Random())(tmp_path)
    assert len(seen) == 3 + 3 + 2 + 2 + 1


def test_a_digest_names_all_that_decides() -> None:
    given = {"levels": 1, "seeds": (0,)}
    base = Lottery(net, fit(40), **given)  # type: ignore[arg-type]
    last = Job(sc.lottery.Ticket(), 1, 0)
    other = [
        Lottery(net, fit(41), **given),  # type: ignore[arg-type]
        Lottery(net, fit(40, batch=31), **given),  # type: ignore[arg-type]
        Lottery(net, fit(40, optimizer=partial(torch.optim.Adam, lr=0.02)), **given),  # type: ignore[arg-type]
        Lottery(net, fit(40, schedule=sc.milestones(3)), **given),  # type: ignore[arg-type]
        Lottery(partial(net, 2.0), fit(40), **given),  # type: ignore[arg-type]
        Lottery(net, fit(40), evaluate=accuracy, **given),  # type: ignore[arg-type]
        base.but(rate=0.3),
        base.but(allocation=sc.uniform),
        base.but(pattern=sc.PerRow()),
        base.but(where=sc.Where(include="0.weight")),
        base.but(name="x"),
    ]
    keys = [run.key(last) for run in (base, *other)]
    assert len(set(keys)) == len(keys)
    assert base.but().key(last) == keys[0] == Lottery(net, fit(40), **given).key(last)  # type: ignore[arg-type]
    moved = fit(40)
    moved.inputs[0, 0] += 1
    assert Lottery(net, moved, **given).key(last) != keys[0]  # type: ignore[arg-type]
    assert describe(torch.zeros(2)) != describe(torch.zeros(2, 1)) != describe(torch.zeros(2, 1).double())
    assert describe(lambda x: x) != describe(lambda x: x + 1)
    assert describe(partial(net, 1.0)) != describe(partial(net, 2.0))

    script = """
from dataclasses import dataclass
import math
import torch

@dataclass(frozen=True)
class Settings:
    width: int = 3

RATE, SETTINGS, OPTIONS, LOG, count, DATA = 0.1, Settings(), {"a": 1}, [], 0, torch.zeros(2)
SLOPE, MADE = 0.7, 0.8

def helper(n):
    return n * RATE if n else train(1)

class Base:
    def size(self):
        return 4

class Net(Base):
    def forward(self):
        return OPTIONS, DATA

    @property
    def slope(self):
        return SLOPE

    @classmethod
    def made(cls):
        return MADE

def train(n):
    global count
    count += 1
    LOG.append(math.pi)
    return [helper(i) for i in range(SETTINGS.width)], Net()
"""

    def described(old: str, new: str) -> object:
        assert old in script
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(script.replace(old, new), scope)
        return describe(scope["train"])

    same = described("torch", "torch")
    for old, new in (
        ("0.1", "0.2"),
        ("0.7", "0.6"),
        ("0.8", "0.6"),
        ("int = 3", "int = 4"),
        ('"a": 1', '"a": 2'),
        ("n * RATE", "n + RATE"),
    ):
        assert described(old, new) != same, (old, new)
    for old, new in (
        ("torch.zeros(2)", "torch.ones(2)"),
        ("return OPTIONS, DATA", "return DATA, OPTIONS"),
        ("4", "5"),
    ):
        assert described(old, new) != same, (old, new)
    assert described("[], 0", "[1], 5") == same  # what it writes to itself

    # Each function stands there once, however many ways lead to it.
    ways = "def a0(): pass\ndef b0(): pass\n"
    for i in range(1, 60):
        ways += f"def a{i}(): return a{i - 1}(), b{i - 1}()\ndef b{i}(): return b{i - 1}(), a{i - 1}()\n"
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(ways, scope)
    assert len(str(describe(scope["a59"]))) < 100_000

    def closing(n: int) -> object:
        return lambda: n

    assert describe(closing(1)) == describe(closing(1)) != describe(closing(2))
    assert describe({"a": (1, None, 2.0)}) == {"a": [1, None, 2.0]}


def test_a_program_has_the_digests_of_the_module(tmp_path: Path) -> None:
    """Run with `-m`, it sees the package that it belongs to."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("def width():\n    return 3\n")
    (package / "main.py").write_text(
        "from secateur.lottery.identity import describe, digest\nfrom mine.nets import width\n"
        "def make():\n    return width()\nif __name__ == '__main__':\n    print(digest(describe(make)))\n"
    )

    def said(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    first = said("-m", "mine.main")
    assert said("-c", "from mine import main as m; print(m.digest(m.describe(m.make)))") == first
    (package / "nets.py").write_text("def width():\n    return 4\n")
    assert said("-m", "mine.main") != first


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )


def test_weights_in_another_order_of_memory(tmp_path: Path) -> None:
    x, y = task(100)
    images = x.repeat_interleave(5, 1).view(-1, 2, 5, 5).contiguous(memory_format=torch.channels_last)
    train = Fit(images, y, steps=5, batch=32, test=(images, y))
    run = Lottery(channels_last, train, levels=1, seeds=[0], controls=[sc.Twin()])
    table = run(tmp_path)
    store = Store(tmp_path)
    for r in table:
        weights, mask = store.weights(r.key), store.masks(r.key)
        assert weights["0.weight"].is_contiguous()
        model = channels_last()
        model.load_state_dict(weights)
        mask.check(model)
        assert train.evaluate(model.eval()) == r.values


def test_the_index_is_made_anew_from_the_folders(tmp_path: Path) -> None:
    run = noisy(levels=1, seeds=(0,))
    table = run(tmp_path)
    store = Store(tmp_path)
    rows = store.all()
    assert [r.branch for r in rows] == ["start", "ticket", "ticket"]
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        sql = "SELECT branch, level, seed, density FROM trainings WHERE branch = 'ticket' ORDER BY level"
        assert index.execute(sql).fetchall() == [
            ("ticket", 0, 0, 1.0),
            ("ticket", 1, 0, table.rows[1].density),
        ]
    (tmp_path / "index.sqlite").unlink()
    assert store.all() == rows
    (tmp_path / "index.sqlite").write_bytes(b"no database at all, but long enough to be taken for one" * 40)
    assert store.all() == rows
    gone = store.path(table.rows[1].key)
    gone.rename(tmp_path / "elsewhere")
    assert [r.key for r in store.all()] == [r.key for r in rows if r.key != table.rows[1].key]
    assert len(run(tmp_path)) == 2 and store.has(table.rows[1].key)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Where a training is finished beside it, an hour later; not what another process is writing now."""
    table = Lottery(net, fit(10), levels=0, seeds=[0])(tmp_path)
    place = Store(tmp_path).path(table.rows[0].key)
    old, new = place.parent / ".new-old", place.parent / ".new-now"
    for folder in (old, new):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    (place / "training.json").unlink()
    Lottery(net, fit(10), levels=0, seeds=[0])(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    run = noisy(levels=1, seeds=(0,))
    table = run(tmp_path)
    store = Store(tmp_path)
    folder = store.path(table.rows[0].key)
    (folder / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="remove its folder, and the training is repeated"):
        store.weights(table.rows[0].key)
    (folder / "training.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        run(tmp_path)
    (folder / "training.json").write_text(json.dumps({"log": []}))
    with pytest.raises(ArtifactError, match="is damaged"):
        run.finished(store)
    with pytest.raises(ArtifactError, match="holds no training 123"):
        store.get("123")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        Store(tmp_path / "file")
    next((tmp_path / "experiments").iterdir()).write_text("[]")
    with pytest.raises(ArtifactError, match="is damaged"):
        store.experiments()
