"""Every kernel against the product in float64, on every path of the dispatch."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hatch_build
from secateur.core.errors import SecateurError
from secateur.runtime import native
from secateur.runtime.formats import Bitmask, Blocks, Indexed
from secateur.runtime.linear import NEVER, SparseLinear
from secateur.runtime.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "secateur" / "runtime" / "native"


def weight_of(rows, columns, sparsity, seed, empty_rows=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) >= sparsity
    weight[:empty_rows] = 0
    return weight


def packings(weight):
    yield Bitmask.pack(weight)
    yield Bitmask.pack(weight, dtype=torch.bfloat16)
    yield Bitmask.pack(weight, dtype=torch.int8)
    yield Bitmask.pack(weight, dtype=torch.int8, group=64)
    yield Indexed.pack(weight)
    yield Indexed.pack(weight, dtype=torch.bfloat16)
    yield Blocks.pack(weight)
    yield Blocks.pack(weight, dtype=torch.bfloat16)


def kernels_of(packed, bias):
    """Layers that use each kernel there is for a format."""
    yield "few", SparseLinear(packed, bias, None, NEVER)
    if native.library() is not None:
        yield "many, kept plan", SparseLinear(packed, bias, Plan.of(packed), 0)
        yield "many, made plan", SparseLinear(packed, bias, None, 0)
    if native.pairs() and packed.values.dtype == torch.bfloat16:
        yield "many, kept plan of pairs", SparseLinear(packed, bias, Plan.of(packed, pairs=True), 0)


def worst(weight, tokens, dtype, seed, threads=1):
    """Largest error of any kernel, over the sum of the sizes of the terms of that output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(weight.shape[0], generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    errors = {}
    try:
        for packed in packings(weight):
            dense = packed.unpack(torch.float64)
            exact = x.double() @ dense.T + bias.double()
            size = x.double().abs() @ dense.abs().T + bias.double().abs()
            for name, layer in kernels_of(packed, bias):
                y = layer(x)
                assert y.dtype == dtype
                error = ((y.double() - exact).abs() / size).max().item()
                errors[f"{type(packed).__name__} {packed.values.dtype} {name}"] = error
    finally:
        torch.set_num_threads(before)
    return errors


# A float32 sum of some hundred terms in any order, and the rounding of a bfloat16 result.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 2**-8}


@settings(max_examples=30)
@given(
    st.integers(1, 150),
    st.integers(1, 700),
    st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 23, 48, 49, 100]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_against_float64(compiled_or_torch, rows, columns, sparsity, tokens, dtype, seed):
    weight = weight_of(rows, columns, sparsity, seed, empty_rows=seed % 3)
    errors = worst(weight, tokens, dtype, seed, threads=1 + seed % 2)
    assert max(errors.values()) < LIMITS[dtype], errors


@pytest.fixture(scope="module")
def compiled_or_torch():
    """Says which kernels were tested."""
    return native.kernels()


@pytest.mark.parametrize("tokens", [2047, 2048, 2100])
def test_more_tokens_than_are_panelled_at_once(compiled, tokens):
    errors = worst(weight_of(70, 200, 0.6, 0), tokens, torch.float32, 0, threads=2)
    assert max(errors.values()) < LIMITS[torch.float32], errors


def test_infinite_inputs_stay_where_they_are(compiled):
    """An infinite input reaches the outputs that use it, and no others."""
    weight = weight_of(40, 130, 0.7, 1)
    x = torch.randn(60, 130)
    x[3, 17] = float("inf")
    for packed in (Bitmask.pack(weight), Indexed.pack(weight)):
        for name, layer in kernels_of(packed, None):
            y = layer(x)
            assert bool(torch.isfinite(y[torch.arange(60) != 3]).all()), name
            if name != "few" or isinstance(
                packed, Indexed
            ):  # a bitmask is spread out to zeros, times infinity
                assert torch.equal(torch.isfinite(y[3]), weight[:, 17] == 0), name


def compiled_sources(compiler, flags, folder, own=lambda stem: []):
    """Objects of all sources, with more flags for some."""

    def one(source):
        made = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, *own(source.stem), "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sorted(SOURCES.glob("*.cpp"))))


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_each_path_of_the_dispatch(compiled, monkeypatch):
    """All that this processor has; test_elsewhere.py has the others."""
    paths = native.usable()
    assert paths[0] == native.kernels()
    assert paths[-2:] == ["portable", "torch"]
    cases = [(5, 70, 0.5, 1), (130, 300, 0.7, 3), (66, 129, 0.95, 60), (3, 3, 1.0, 2)]
    try:
        for kernels in paths:
            monkeypatch.setenv("SECATEUR_KERNELS", kernels)
            native.library.cache_clear()
            native.pairs.cache_clear()
            assert native.kernels() == kernels
            for rows, columns, sparsity, tokens in cases:
                for dtype, limit in LIMITS.items():
                    weight, threads = weight_of(rows, columns, sparsity, 0), 1 + (rows > 100)
                    errors = worst(weight, tokens, dtype, 1, threads)
                    assert max(errors.values()) < limit, (kernels, errors)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        native.pairs.cache_clear()


def test_kernels_that_are_not_there(compiled):
    done = run("from secateur.runtime import kernels; kernels()", SECATEUR_KERNELS="vax")
    assert done.returncode
    assert "SECATEUR_KERNELS=vax" in done.stderr.splitlines()[-1]


def test_a_missing_or_foreign_library_leaves_torch(tmp_path):
    script = f"""
from pathlib import Path
from secateur.runtime import native
native.FILE = Path({str(tmp_path / "_native.so")!r})
print(native.kernels())
native.library.cache_clear()
native.FILE.write_bytes(b"no library")
print(native.kernels())
"""
    done = run(script)
    assert done.stdout.split() == ["torch", "torch"], done.stderr


def test_a_plan_needs_kernels_for_it():
    script = """
import torch
from secateur.runtime import Bitmask, Plan
Plan.of(Bitmask.pack(torch.ones(2, 2)))
"""
    done = run(script, SECATEUR_KERNELS="torch")
    assert "(torch) have no form for many tokens" in done.stderr
    assert issubclass(SecateurError, ValueError)


@pytest.mark.slow
def test_under_sanitizers(compiled, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, on shapes of all kinds."""
    library = tmp_path / "_native.so"
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-w", "-pthread", "-fno-omit-frame-pointer"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sets = hatch_build.SETS.get(platform.machine().lower(), {})
    objects = compiled_sources("c++", flags, tmp_path, lambda stem: sets.get(stem, []))
    subprocess.run(["c++", *flags, "-shared", *objects, "-o", library], check=True)
    preload = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    script = f"""
from pathlib import Path
import torch
from secateur.runtime import native
native.FILE = Path({str(library)!r})
from tests.runtime.test_kernels import weight_of, worst
for seed in range(40):
    draw = torch.Generator().manual_seed(seed)
    rows, columns, tokens = (int(torch.randint(1, most, (), generator=draw)) for most in (140, 500, 110))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    weight = weight_of(rows, columns, (0.0, 0.5, 0.9, 1.0)[seed % 4], seed)
    worst(weight, tokens, dtype, seed, threads=1 + seed % 2)
print(native.kernels())
"""
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    for kernels in native.usable()[:-1]:
        done = run(script, SECATEUR_KERNELS=kernels, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == [kernels]
