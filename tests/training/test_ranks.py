"""Two data-parallel processes have the same masks, and those of one process with the same global batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
torch.set_num_threads(1)
import secateur as sc

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))

def data(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)

METHODS = {
    "gradual": lambda m, own: sc.Gradual(
        m, sc.Magnitude(), sc.cubic(0, 0.8, begin=1, end=10), when=sc.every(3), allocation=sc.global_
    ),
    "rigl": lambda m, own: sc.Dynamic(m, sc.RigL(), 0.7, end=9, when=sc.every(3)),
    "set": lambda m, own: sc.Dynamic(m, sc.SET(), 0.7, end=9, when=sc.every(3)),
    "movement": lambda m, own: sc.Movement(m, sc.cubic(0, 0.7, begin=1, end=9), when=sc.every(2)),
    "acdc": lambda m, own: sc.ACDC(m, sc.Magnitude(), 0.7, sc.Phases((2, 4, 8))),
    "taylor": lambda m, own: sc.Gradual(
        m, sc.Taylor(), sc.cubic(0, 0.8, begin=1, end=10), when=sc.every(3), batches=own, loss=F.cross_entropy
    ),
}

def run(kind, rank, world):
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    method = METHODS[kind](wrapped, [data(1000 + rank)])  # each rank has calibration data of its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with method.attach(optimizer):
        for step in range(12):
            x, y = (t[rank * 16 // world :][: 16 // world] for t in data(step))
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    method.masks.save(folder / f"{kind}-{rank}-of-{world}.masks")
    from safetensors.torch import save_file
    save_file(dict(model.state_dict()), folder / f"{kind}-{rank}-of-{world}.weights")

folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if world > 1:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
for kind in METHODS:
    run(kind, rank, world)
if world > 1:
    torch.distributed.destroy_process_group()
"""

KINDS = ("gradual", "rigl", "set", "movement", "acdc", "taylor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("ranks")
    script = where / "script.py"
    script.write_text(SCRIPT)
    ranks = [(rank, world) for world in (1, 2) for rank in range(world)]
    jobs = [
        subprocess.Popen([sys.executable, script, where, str(rank), str(world)], stderr=subprocess.PIPE)
        for rank, world in ranks
    ]
    for job in jobs:
        _, said = job.communicate(timeout=300)
        assert job.returncode == 0, said.decode()
    return where


@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_have_the_same_masks_and_weights(folder, kind):
    first, second = (sc.Masks.load(folder / f"{kind}-{rank}-of-2.masks") for rank in (0, 1))
    assert first == second and first.sparsity > 0.6
    a, b = (load_file(folder / f"{kind}-{rank}-of-2.weights") for rank in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "taylor"])  # whose calibration data differs
def test_two_ranks_are_one(folder, kind):
    one, two = (sc.Masks.load(folder / f"{kind}-0-of-{world}.masks") for world in (1, 2))
    assert one == two
    a, b = (load_file(folder / f"{kind}-0-of-{world}.weights") for world in (1, 2))
    for name in a:  # gradients are summed in another order
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_sharded_weights_are_refused(folder):
    """FSDP2 replaces parameters by sharded ones, which Secateur says it does not prune."""
    script = folder / "sharded.py"
    script.write_text(
        "import sys, torch, secateur as sc\n"
        "from torch import nn\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "torch.distributed.init_process_group('gloo', f'file://{sys.argv[1]}', rank=0, world_size=1)\n"
        "mesh = torch.distributed.init_device_mesh('cpu', (1,))\n"
        "model = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), mesh=mesh)\n"
        "try:\n"
        "    sc.Gradual(model, sc.Magnitude(), sc.one_shot(0.5))\n"
        "except sc.SelectionError as error:\n"
        "    print(error)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, script, folder / "sharded"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "sharded over devices (DTensor), which is not supported" in done.stdout
