"""SIGKILL at any moment: the same call goes on to the same bytes, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.artifacts.manifest import Manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers, about configurations
    pytest.mark.skipif(sys.platform != "linux", reason="Forks."),
]

# Imports what pruning needs once, then forks a process for every line that it reads.
SERVER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
import secateur as sc
from secateur.checkpoint import prune_checkpoint

CALLS = ("chmod", "fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
calls = []

def counted(name, kill_at):
    call = getattr(os, name)
    def f(*args, **kwargs):
        calls.append(f"{name} {args[0]}")
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return f

def prune(source, out, kill_at, reconstruct=None, batches=8, sparsity=0.5, **given):
    for name in CALLS:
        setattr(os, name, counted(name, kill_at))
    ids = torch.randint(97, (batches, 2, 24), generator=torch.Generator().manual_seed(1))
    tuned = sc.Reconstruct(epochs=reconstruct) if reconstruct else None
    data = [{"input_ids": i} for i in ids]
    prune_checkpoint(source, out, sc.SparseGPT(), sparsity, batches=data, reconstruct=tuned, **given)

def child(write, given):
    error = ""
    try:
        prune(**given)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    os.write(write, json.dumps({"calls": calls, "error": error}).encode())
    os._exit(0)

for line in sys.stdin:
    given = json.loads(line)
    kill_after = given.pop("kill_after")
    read, write = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(write, given)
    os.close(write)
    if kill_after:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() - start > kill_after:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
    said = b""
    while part := os.read(read, 65536):
        said += part
    os.close(read)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    found = {} if killed else json.loads(said)
    print(json.dumps({"killed": killed, "seconds": time.monotonic() - start, **found}), flush=True)
"""


class Pruning:
    """A process that forks one for each run, with what all runs of a test are given."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, out: Path, *, kill_after: float = 0, kill_at: int = 0, **given: Any) -> dict[str, Any]:
        """One run: killed after so many seconds, or at a call that changes files; what came of it."""
        assert self._server.stdin and self._server.stdout
        sent = {"out": str(out), "kill_after": kill_after, "kill_at": kill_at, **given}
        self._server.stdin.write(json.dumps(sent) + "\n")
        self._server.stdin.flush()
        said: dict[str, Any] = json.loads(self._server.stdout.readline())
        assert said["killed"] or not said["error"], said["error"]
        return said

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


@pytest.fixture(scope="module")
def pruning() -> Iterator[Pruning]:
    pruning = Pruning()
    yield pruning
    pruning.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 97}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("model") / "dense"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """All files; of the report what does not depend on the machine's time and memory."""
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    if "report.json" in found:
        report = json.loads(found["report.json"])
        report["notes"] = [note for note in report["notes"] if not note.startswith("Pruned block by block")]
        found["report.json"] = report | {"seconds": None}
    if "secateur.json" in found:
        manifest = json.loads(found["secateur.json"])
        manifest["files"].pop("report.json")
        found["secateur.json"] = manifest
    return found


def check_visible(out: Path, expected: dict[str, Any], earlier: dict[str, Any]) -> None:
    """What is seen under the final names is whole, and a model that can be loaded is one of the two."""
    seen = {n: v for n, v in contents(out).items() if not n.startswith(".")} if out.is_dir() else {}
    assert all(value in (expected.get(name), earlier.get(name)) for name, value in seen.items())
    if "secateur.json" in seen:
        Manifest.read(out).verify(out)
        assert seen in (expected, earlier)
    needed = [n for n in expected if n.startswith("model") or n == "config.json"]
    if all(n in seen for n in needed):
        assert any(all(seen[n] == one.get(n) for n in needed) for one in (expected, earlier))


class Killed:
    """Runs into one folder after the other, killed again and again, until so many kills have landed."""

    def __init__(self, pruning: Pruning, dense: Path, folder: Path, **given: Any) -> None:
        self.pruning, self.dense, self.folder = pruning, dense, folder
        self.given = {"source": str(dense), **given}
        self.source = contents(dense)
        self.whole = pruning.run(folder / "whole", **self.given)
        self.expected = contents(folder / "whole")
        self.kills = 0

    def at_random(self, kills: int, seed: int) -> None:
        draw, rounds = random.Random(seed), 0
        while self.kills < kills:
            rounds += 1
            out = self.folder / f"out-{rounds}"
            # The first run takes longest, so that a kill can land in each of the others too.
            while self.run(out, kill_after=draw.uniform(0.05, 0.6) * self.whole["seconds"])["killed"]:
                pass
            self.check(out)

    def at_calls(self, calls: list[int], earlier: Path | None = None) -> None:
        for call in calls:
            out = self.folder / "out"
            if earlier is not None:
                shutil.copytree(earlier, out)
            before = contents(out) if earlier else {}
            assert self.run(out, before, kill_at=call)["killed"], self.whole["calls"][call - 1]
            self.run(out, before)
            self.check(out)
            shutil.rmtree(out)

    def run(self, out: Path, earlier: dict[str, Any] | None = None, **how: Any) -> dict[str, Any]:
        said = self.pruning.run(out, **how, **self.given)
        self.kills += said["killed"]
        check_visible(out, self.expected, earlier or {})
        return said

    def check(self, out: Path) -> None:
        assert contents(out) == self.expected
        assert contents(self.dense) == self.source


def exchange(whole: dict[str, Any]) -> range:
    """The calls from the masks' end on, when all blocks are done."""
    calls = whole["calls"]
    begin = max(i for i, call in enumerate(calls) if "journal.json" in call and call.startswith("replace"))
    return range(begin + 1, len(calls) + 1)


def test_killed_at_random_moments(pruning: Pruning, dense: Path, tmp_path: Path) -> None:
    killed = Killed(pruning, dense, tmp_path)
    killed.at_random(4, seed=0)
    assert killed.kills >= 4


def test_killed_while_files_are_copied_and_exchanged(pruning: Pruning, dense: Path, tmp_path: Path) -> None:
    killed = Killed(pruning, dense, tmp_path, batches=3)
    calls, last = killed.whole["calls"], exchange(killed.whole)
    journals = [i for i, call in enumerate(calls, 1) if "journal.json" in call and call.startswith("replace")]
    draw = random.Random(1)
    copying = [draw.randrange(2, journals[0]) for _ in range(2)]
    # Between the states of a block and its journal, and before the states that it replaces are removed.
    between = [journals[3], journals[3] + 2]
    killed.at_calls([*copying, *between, *sorted(draw.sample(last, 4))])


def test_a_run_that_is_resumed_finds_its_source_as_it_was(
    pruning: Pruning, dense: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    killed = Killed(pruning, source, tmp_path, batches=3)
    assert killed.run(tmp_path / "out", kill_at=exchange(killed.whole)[0] - 20)["killed"]
    shard = min(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(AssertionError, match="unfinished run with other settings"):
        killed.run(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{}, {"spill": 0}, {"correction": 0.1}, {"reconstruct": 1, "spill": 0, "correction": 0.1}],
    ids=["solved", "spilled", "corrected", "reconstructed"],
)
def test_killed_often(given: dict[str, Any], pruning: Pruning, dense: Path, tmp_path: Path) -> None:
    killed = Killed(pruning, dense, tmp_path, **given)
    killed.at_random(20, seed=2)
    assert killed.kills >= 20


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["new", "over an earlier result"])
def test_killed_at_each_call_of_the_exchange(
    again: bool, pruning: Pruning, dense: Path, tmp_path: Path
) -> None:
    killed = Killed(pruning, dense, tmp_path, batches=2)
    earlier = tmp_path / "earlier"
    pruning.run(earlier, source=str(dense), sparsity=0.7, batches=2)
    whole = killed.whole
    if again:
        shutil.copytree(earlier, tmp_path / "again")
        whole = killed.run(tmp_path / "again", contents(earlier))
    killed.at_calls(list(exchange(whole)), earlier if again else None)
    sc.load(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_calls_of_the_whole_run(pruning: Pruning, dense: Path, tmp_path: Path) -> None:
    given = {"batches": 2, "reconstruct": 1, "correction": 0.1, "spill": 0}
    killed = Killed(pruning, dense, tmp_path, **given)
    killed.at_calls(list(range(1, exchange(killed.whole)[0], 3)))
