"""A checkpoint several times larger than a process may address, pruned block by block in that process.

    python -m benchmarks.checkpoint_memory [--gigabytes 6] [--limit 1.2] [--scratch DIRECTORY]

Writes a Llama of random float32 weights in shards of about 200 MB, prunes it to 50 % with SparseGPT in a
process whose address space is limited from its first line on (RLIMIT_AS), one thread, and checks the result
shard by shard. What is resident at most is set beside what makes it up: the same process before it prunes,
the largest block, the calibration states of one block (which here stay in files).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.artifacts.manifest import Manifest
from secateur.artifacts.shards import Shards

WIDTH, INNER, HEADS, GROUPS, VOCABULARY = 1024, 2048, 16, 4, 4096
SHARD = 200_000_000  # bytes
EXAMPLES, LENGTH = 4, 32
SPARSITY = 0.5

LIMITED = """
import resource, sys
limit = int(float(sys.argv[3]) * 1e9)
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import json
from pathlib import Path
import torch
import secateur as sc
import transformers
from transformers import LlamaForCausalLM
from secateur.checkpoint import prune_checkpoint

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def peaks():  # not ru_maxrss, which begins with that of the process that started this one
    return {"peak_bytes": status("VmHWM"), "address_bytes": status("VmPeak")}

torch.set_num_threads(1)
torch.linalg.cholesky(torch.eye(64) @ torch.eye(64))  # libraries that torch loads when first used
empty = peaks()
solver, examples, length = getattr(sc, sys.argv[4])(), int(sys.argv[5]), int(sys.argv[6])
ids = torch.randint(4096, (examples, 1, length), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": i} for i in ids]
report = prune_checkpoint(sys.argv[1], sys.argv[2], solver, 0.5, batches=data, spill=0)
print(json.dumps({"empty": empty, **peaks(), "seconds": report.seconds["pruning"]}))
"""


def block(i: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one block of a Llama."""
    narrow = WIDTH // HEADS * GROUPS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (narrow, WIDTH),
        "self_attn.v_proj": (narrow, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    return {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}


BLOCK = 4 * sum(torch.Size(shape).numel() for shape in block(0).values())  # bytes


def write(folder: Path, blocks: int, shard: int = SHARD) -> int:
    """A checkpoint, shard by shard; its bytes."""
    from transformers import LlamaConfig

    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    at_once = max(1, shard // BLOCK)
    parts = [ends, *({} for _ in range(0, blocks, at_once))]
    for i in range(blocks):
        parts[1 + i // at_once].update(block(i))
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({key: _weight(shape, generator) for key, shape in shapes.items()}, folder / name)
        index.update(dict.fromkeys(shapes, name))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return Shards.open(folder).total_bytes


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02


def prune(source: Path, out: Path, gigabytes: float, solver: str = "SparseGPT") -> dict[str, Any]:
    """Prune in a process of its own, which may address so much; 0 for no limit."""
    given = [str(source), str(out), str(gigabytes), solver, str(EXAMPLES), str(LENGTH)]
    # glibc then gives large blocks back at once; else holes in its heap, never touched, count as addressed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(source: Path, out: Path) -> int:
    """Every layer of a block has its sparsity, nothing else has changed; the number of layers."""
    before, after = Shards.open(source), Shards.open(out)
    assert before.names == after.names
    layers = 0
    for name in after.names:
        value = after.read(name)
        if "_proj" in name:
            layers += 1
            assert int((value == 0).sum()) == round(SPARSITY * value.numel()), name
        else:
            assert value.equal(before.read(name)), name
    listed = json.loads((out / "report.json").read_text())["layers"]
    assert len(listed) == layers and all(layer["sparsity"] == SPARSITY for layer in listed)
    masks = Manifest.read(out).files["masks.safetensors"]
    assert masks.bytes == (out / "masks.safetensors").stat().st_size
    return layers


def measure(gigabytes: float, limit: float, scratch: Path) -> dict[str, Any]:
    source, out = scratch / "dense", scratch / "pruned"
    source.mkdir()
    blocks = round(gigabytes * 1e9 / BLOCK)
    size = write(source, blocks)
    start = time.perf_counter()
    found = prune(source, out, limit)
    took = time.perf_counter() - start
    states = EXAMPLES * LENGTH * WIDTH * 4
    return {
        "checkpoint_bytes": size,
        "shards": len(list(source.glob("*.safetensors"))),
        "blocks": blocks,
        "layers": check(source, out),
        "limit_bytes": int(limit * 1e9),
        "checkpoint_over_limit": size / (limit * 1e9) if limit else None,
        "block_bytes": BLOCK,
        "states_bytes": states,
        "constant_bytes": found["peak_bytes"] - BLOCK - states,
        **found,
        "wall_s": took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint_memory.json"))
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of the checkpoint")
    parser.add_argument("--limit", type=float, default=1.2, help="gigabytes of address space; 0: none")
    parser.add_argument("--scratch", type=Path, help="where there is space for twice the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        row = measure(args.gigabytes, args.limit, scratch)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(row, indent=1))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
    }
    args.out.write_text(json.dumps({"machine": machine, "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
