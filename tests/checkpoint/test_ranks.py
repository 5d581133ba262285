"""Two processes give what one gives, go on where they were stopped, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import secateur as sc
from secateur.checkpoint.output import Output
from secateur.stream import ranks, sequence

class Stop(Exception):
    pass

def batches(bad=()):
    ids = torch.randint(97, (6, 4, 32), generator=torch.Generator().manual_seed(1))
    for i in bad:
        ids[i, 0, 0] = 10**6
    return [{"input_ids": i} for i in ids]

def prune(out, **given):
    given = {"batches": batches(), **given}
    return sc.prune_checkpoint(folder / "dense", folder / out, sc.SparseGPT(), 0.5, **given)

def stopped(out, block):
    keep = Output.keep
    def until(self, journal):
        keep(self, journal)
        if journal.next == block:
            raise Stop
    Output.keep = until
    try:
        prune(out)
    except Stop:
        pass
    Output.keep = keep

folder, what, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with ranks.start():
    if what == "bad":
        prune(name, batches=batches(bad=[int(sys.argv[4])]))
    else:
        prune(f"{name}-plain")
        prune(f"{name}-corrected", correction=0.1)
        prune(f"{name}-owl", allocation=sc.owl)
        tuned, tune = [], sequence.reconstruct_
        def noted(walk, dense, masks, *given):
            found = tune(walk, dense, masks, *given)
            tuned.extend(float(t.weight.double().sum()) for t in masks)
            return found
        sequence.reconstruct_ = noted
        prune(f"{name}-tuned", reconstruct=sc.Reconstruct(epochs=1))
        (folder / f"{name}-tuned-{ranks.rank()}").write_text(repr(tuned))
        stopped(f"{name}-stopped", 2)
        prune(f"{name}-stopped")
        try:
            prune(f"{name}-few", batches=batches()[: ranks.count() - 1])
        except sc.core.errors.StatsError as error:
            (folder / f"few-{ranks.rank()}").write_text(str(error))
"""


def launched(count: int, *given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    folder = Path(str(given[0]))
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [*command, str(folder / "script.py"), *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 97}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("ranks")
    LlamaForCausalLM(config).save_pretrained(folder / "dense", max_shard_size="200KB")
    return folder


def read(folder: Path) -> tuple[sc.Masks, dict[str, Any]]:
    return sc.Masks.load(folder / "masks.safetensors"), json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Path:
    for count, name in ((1, "one"), (2, "two")):
        done = launched(count, folder, "all", name)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("how", ["plain", "corrected", "owl"])
def test_two_processes_give_what_one_gives(how: str, pruned: Path) -> None:
    # Only the order in which sums of products are added differs.
    (one, first), (two, second) = read(pruned / f"one-{how}"), read(pruned / f"two-{how}")
    assert one.keys() == two.keys()
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing <= 1e-3 * sum(one[name].numel() for name in one)
    for a, b in zip(first["layers"], second["layers"], strict=True):
        assert a["name"] == b["name"] and a["removed"] == b["removed"]
        assert b["error"] == pytest.approx(a["error"], rel=1e-4)
    dense, pruned_two = sc.load(pruned / f"one-{how}"), sc.load(pruned / f"two-{how}")
    ids = torch.arange(32)[None]
    torch.testing.assert_close(dense(ids).logits, pruned_two(ids).logits, rtol=0.01, atol=0.01)


def test_processes_tune_the_same_weights(pruned: Path) -> None:
    texts = [(pruned / f"two-tuned-{rank}").read_text() for rank in range(2)]
    assert texts[0] == texts[1] != "[]"
    one, two = (
        sum(layer["error"] for layer in read(pruned / f"{name}-tuned")[1]["layers"])
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=0.2)


@pytest.mark.parametrize("name", ["one", "two"])
def test_processes_that_were_stopped_go_on_with_the_same_result(name: str, pruned: Path) -> None:
    files = sorted(p.name for p in (pruned / f"{name}-plain").glob("*.safetensors"))
    for file in files:
        bytes_ = (pruned / f"{name}-plain" / file).read_bytes()
        assert bytes_ == (pruned / f"{name}-stopped" / file).read_bytes()
    assert not (pruned / f"{name}-stopped" / ".secateur-run").exists()


def test_fewer_batches_than_processes_are_refused_by_each(pruned: Path) -> None:
    for rank in range(2):
        assert "fewer batches than processes (2)" in (pruned / f"few-{rank}").read_text()


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["first", "later"])
def test_bad_data_of_one_process_ends_all(batch: int, folder: Path) -> None:
    done = launched(2, folder, "bad", f"bad-{batch}", batch)
    assert done.returncode != 0
    assert "StatsError: LlamaForCausalLM fails on" in done.stderr
    assert "index out of range" in done.stderr
    left = folder / f"bad-{batch}"
    assert not left.exists() or not [p for p in left.iterdir() if p.name != ".secateur-run"]
