"""One layer, sparse against every dense kernel at hand, with weights that come from memory.

    python -m benchmarks.sparse_linear [--shapes 4096x4096 ...] [--sparsities 0.5 ...] [--tokens 1 ...]
                                       [--pattern 16x1] [--threads 1] [--rounds 5] [--out FILE.jsonl]

All contenders of a cell are called in turn, each on copies of its weight in turn that together are larger
than any cache. One thread: CPU time of the thread; more: wall time. Median and quartiles. Ratios are to the
fastest dense kernel of 16 or 32 bits in the same cell. Masks are random, of entries or of blocks
(`--pattern`); the values are Gaussian. Every contender's result is compared with float64 first. `--table`
writes `results/sparse_linear.md` from them. ONNX Runtime takes part where it is installed (`pip install
onnx onnxruntime`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.runtime import Bitmask, Blocks, Indexed, Plan, native
from secateur.runtime.choose import paired
from secateur.runtime.formats.bitmask import STEPS, _in_order
from secateur.runtime.formats.common import nbytes
from secateur.runtime.linear import NEVER, SparseLinear

RESULTS = Path(__file__).parent / "results"
FILE, TABLE = RESULTS / "sparse_linear.jsonl", RESULTS / "sparse_linear.md"
FROM_MEMORY = 130_000_000  # bytes of copies of a weight
SHAPES = ("768x768", "3072x768", "4096x4096", "11008x4096")
Run = Callable[[], Tensor]


class Contender:
    """A kernel and copies of its weight; `bound`: its distance from float64, over the largest output."""

    def __init__(self, name: str, dense: bool, size: int, make: Callable[[], Run], bound: float) -> None:
        self.name, self.dense, self.bound = name, dense, bound
        self.runs = [make() for _ in range(max(1, FROM_MEMORY // max(1, size)))]
        self.seconds: list[float] = []


def dense_contenders(W_NK: Tensor, x_TK: Tensor) -> Iterator[Contender]:
    """Torch's own, oneDNN with packed weights, torch's int8 and int4, ONNX Runtime, our streamed one."""
    N, K = W_NK.shape
    narrow, x_bf = W_NK.bfloat16(), x_TK.bfloat16()
    yield Contender("torch float32", True, N * K * 4, lambda: _linear(x_TK, W_NK.clone()), 1e-4)
    yield Contender("torch bfloat16", True, N * K * 2, lambda: _linear(x_bf, narrow.clone()), 3e-2)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield Contender("oneDNN bfloat16, packed", True, N * K * 2, lambda: _onednn(x_bf, narrow), 3e-2)
    if native.library() is not None:
        for dtype, x in ((torch.float32, x_TK), (torch.bfloat16, x_TK)):
            if len(x_TK) <= 16:
                name = f"streamed {str(dtype).removeprefix('torch.')}"
                size = N * K * dtype.itemsize
                yield Contender(name, True, size, lambda x=x, d=dtype: _streamed(x, W_NK.to(d)), 2e-2)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(W_NK)
    yield Contender("torch int8, dynamic", True, N * K, lambda: _dynamic(linear, x_TK), 6e-2)
    if N % 16 == 0 and K % 32 == 0:
        yield Contender("torch int4, packed", True, N * K // 2, lambda: _int4(W_NK, x_bf), 0.3)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return
    yield Contender("ONNX Runtime float32", True, N * K * 4, lambda: _onnx(W_NK, x_TK), 1e-4)


def sparse_contenders(W_NK: Tensor, x_TK: Tensor, pattern: str) -> Iterator[Contender]:
    """Torch's CSR and ours."""
    csr = W_NK.to_sparse_csr()
    size = csr.values().numel() * 12
    yield Contender("torch CSR float32", False, size, lambda: _csr(W_NK.to_sparse_csr(), x_TK), 1e-4)
    packings: list[tuple[str, Bitmask | Blocks | Indexed, float]] = [
        ("bitmask float32", Bitmask.pack(W_NK), 1e-4),
        ("bitmask bfloat16", Bitmask.pack(W_NK, dtype=torch.bfloat16), 2e-2),
        ("bitmask int8", Bitmask.pack(W_NK, dtype=torch.int8), 3e-2),
        ("indexed float32", Indexed.pack(W_NK), 1e-4),
        ("indexed bfloat16", Indexed.pack(W_NK, dtype=torch.bfloat16), 2e-2),
    ]
    if pattern == "16x1":
        packings.append(("blocks float32", Blocks.pack(W_NK), 1e-4))
        packings.append(("blocks bfloat16", Blocks.pack(W_NK, dtype=torch.bfloat16), 2e-2))
    for name, packed, bound in packings:
        pairs = paired(torch.bfloat16, packed.values.dtype)  # then these kernels want x in bfloat16 as well
        x = x_TK.bfloat16() if pairs else x_TK
        if len(x_TK) <= 16:
            yield Contender(
                name, False, nbytes(packed), lambda p=packed, x=x: _ours(p, x, None, NEVER), bound
            )
        if len(x_TK) > 1 and native.library() is not None and "bitmask" in name and "int8" not in name:
            size = Plan.of(packed, pairs).nbytes
            make = lambda p=packed, x=x, d=pairs: _ours(p, x, Plan.of(p, d), 0)  # noqa: E731
            yield Contender(f"plan {name.split()[1]}", False, size, make, bound)
            if len(x_TK) >= 64:
                made = lambda p=packed, x=x: _ours(p, x, None, 0)  # noqa: E731
                yield Contender(f"{name}, plan made at each call", False, nbytes(packed), made, bound)


def _linear(x: Tensor, weight: Tensor) -> Run:
    return lambda: F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Run:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _streamed(x: Tensor, weight: Tensor) -> Run:
    N, K = weight.shape
    flat = _in_order(weight, STEPS[weight.dtype]).clone()
    call = native.Call("dense", native.CDense(N, K, flat.data_ptr(), native.TYPES[weight.dtype]), K, N)
    call.keep = flat
    return lambda: call(x, len(x), None)


def _dynamic(linear: torch.nn.Linear, x: Tensor) -> Run:
    model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})
    return lambda: model(x)


def _int4(weight: Tensor, x: Tensor) -> Run:
    N, K = weight.shape
    grouped = weight.view(N, -1, 32)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6)
    levels = ((grouped - low) / scale).round().clamp(0, 15).to(torch.int32).view(N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    zeros = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, zeros)


def _onnx(weight: Tensor, x: Tensor) -> Run:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, weight.shape[1]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, weight.shape[0]])]
    graph = helper.make_graph(
        [node], "g", inputs, outputs, [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")]
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    array = x.numpy()
    del onnx
    return lambda: torch.from_numpy(session.run(None, {"x": array})[0])


def _csr(weight: Tensor, x: Tensor) -> Run:
    turned = x.T.contiguous()
    return lambda: torch.sparse.mm(weight, turned).T


def _ours(packed: Bitmask | Blocks | Indexed, x: Tensor, plan: Plan | None, switch: int) -> Run:
    import dataclasses

    own = dataclasses.replace(packed, **{n: b.clone() for n, b in packed.buffers().items()})
    layer = SparseLinear(own, None, plan, switch)
    return lambda: layer(x)


def cell(N: int, K: int, sparsity: float, pattern: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """All contenders in turn."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(N, K, generator=generator) * K**-0.5
    if pattern == "16x1":
        keep = (torch.rand(N // 16, 1, K, generator=generator) >= sparsity).expand(-1, 16, -1).reshape(N, K)
    else:
        keep = torch.rand(N, K, generator=generator) >= sparsity
    sparse = dense * keep
    x = torch.randn(tokens, K, generator=generator)
    contenders = [*dense_contenders(dense, x), *sparse_contenders(sparse, x, pattern)]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for c in contenders:
        exact = x.double() @ (dense if c.dense else sparse).double().T
        error = float((c.runs[0]().double() - exact).abs().max() / exact.abs().max())
        if not error < c.bound:
            raise AssertionError(f"{c.name} is off by {error:.2e} at {N}x{K}, {sparsity}, {tokens} tokens.")
        for run in c.runs:  # pages, checks of buffers, primitives
            run()
    for _ in range(rounds):
        for c in contenders:
            for run in c.runs[:16]:
                started = clock()
                run()
                c.seconds.append(clock() - started)
    # Weights of four and eight bits are shown, but are no measure for sixteen and more.
    best = min(statistics.median(c.seconds) for c in contenders if c.dense and " int" not in c.name)
    rows = []
    for c in contenders:
        low, median, high = statistics.quantiles(c.seconds, n=4, method="inclusive")
        rows.append(
            {"shape": f"{N}x{K}", "sparsity": sparsity, "tokens": tokens, "threads": torch.get_num_threads()}
            | {
                "pattern": pattern,
                "contender": c.name,
                "dense": c.dense,
                "us": round(1e6 * median, 1),
                "low": round(1e6 * low, 1),
            }
            | {"high": round(1e6 * high, 1), "calls": len(c.seconds), "times faster": round(best / median, 3)}
            | {"kernels": native.kernels(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
            | {"torch": torch.__version__}
        )
    return rows


def write_table(rows: list[dict[str, Any]]) -> None:
    """Times over the fastest dense kernel of the cell, as Markdown."""
    lines = [
        "# Sparse layers against the fastest dense kernel",
        "",
        "Written by `python -m benchmarks.sparse_linear`.",
    ]
    keys = ("shape", "threads", "pattern")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        mine = [r for r in rows if tuple(r[k] for k in keys) == key]
        sparsities = sorted({r["sparsity"] for r in mine})
        first = mine[0]
        lines += [
            "",
            "## {}, {} threads, zeros {}, {kernels} ({machine}, torch {torch})".format(*key, **first),
        ]
        for tokens in sorted({r["tokens"] for r in mine}):
            at = [r for r in mine if r["tokens"] == tokens]
            lines += [
                "",
                f"### {tokens} tokens: times faster than the fastest dense (median us; quartiles)",
                "",
            ]
            lines += [
                "| | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |",
                "| --- |" + " ---: |" * len(sparsities),
            ]
            for name in dict.fromkeys(r["contender"] for r in at):
                cells = []
                for s in sparsities:
                    found = [r for r in at if r["contender"] == name and r["sparsity"] == s]
                    text = "{times faster:.2f} ({us:.0f}; {low:.0f} to {high:.0f})"
                    cells.append(text.format(**found[-1]) if found else "—")
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--pattern", default="anywhere", choices=["anywhere", "16x1"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    for shape in [] if arguments.table else arguments.shapes:
        N, K = map(int, shape.split("x"))
        for tokens in arguments.tokens:
            for sparsity in arguments.sparsities:
                rows = cell(N, K, sparsity, arguments.pattern, tokens, arguments.rounds)
                with arguments.out.open("a", encoding="utf-8") as f:
                    f.writelines(json.dumps(r) + "\n" for r in rows)
                best = max((r for r in rows if not r["dense"]), key=lambda r: r["times faster"])
                print(shape, tokens, sparsity, best["contender"], best["times faster"], flush=True)
    if FILE.exists():
        old = {"pattern": "anywhere"}  # of rows from before there was another
        write_table([old | json.loads(line) for line in FILE.read_text().splitlines()])


if __name__ == "__main__":
    main()
