"""Kernels for processors that this machine may not have: their logic emulated, or the whole program."""

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from secateur.runtime import native
from tests.conftest import skip_or_fail
from tests.runtime.test_kernels import LIMITS, SOURCES, compiled_sources, packings, run, weight_of

HERE = Path(__file__).parent


SETS = ("avx512bf16", "avx512vbmi2", "avx512f")

SCRIPT = """
import os
from pathlib import Path
import torch
from secateur.core.errors import SecateurError
from secateur.runtime import Bitmask, Plan, SparseLinear, native
native.FILE = Path({library!r})
from tests.runtime.test_kernels import LIMITS, weight_of, worst
for os.environ["SECATEUR_KERNELS"] in {sets}:
    native.library.cache_clear()
    native.pairs.cache_clear()
    for seed in range({cases}):
        draw = torch.Generator().manual_seed(seed)
        rows, columns, tokens = (int(torch.randint(1, most, (), generator=draw)) for most in (140, 700, 110))
        tokens = tokens if seed % 2 else 1 + tokens % 14
        dtype = (torch.float32, torch.bfloat16)[seed % 3 == 0]
        weight = weight_of(rows, columns, (0.0, 0.5, 0.9, 1.0)[seed % 4], seed, empty_rows=seed % 3)
        errors = worst(weight, tokens, dtype, seed, threads=1 + seed % 2)
        assert max(errors.values()) < LIMITS[dtype], (native.kernels(), rows, columns, tokens, dtype, errors)
    print(native.kernels(), sum("pairs" in name for name in errors))
    if native.pairs():
        packed = Bitmask.pack(weight_of(70, 200, 0.5, 0), dtype=torch.bfloat16)
        foreign = Plan.of(packed, pairs=True)
# Where no kernel takes pairs, theirs are not read as something else, and none are made.
x = torch.ones(60, 200).bfloat16()
expected = SparseLinear(packed, None, None, 0)(x)
assert torch.equal(SparseLinear(packed, None, foreign, 0)(x), expected)
try:
    Plan.of(packed, pairs=True)
except SecateurError as error:
    print(error)
"""


def emulated(folder, extra=()):
    """The library with AVX-512 in plain C++."""
    avx2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
    flags = ["-std=c++17", "-O0", "-fPIC", "-pthread", "-DSECATEUR_EMULATED", "-Wno-psabi", *extra]

    def own(stem):
        instead = ["-Wno-ignored-attributes", "-include", HERE / "emulated_avx512.h"]
        return avx2 + (instead if stem.startswith("avx512") else [])

    objects = compiled_sources("c++", flags, folder, own)
    library = folder / "_native.so"
    subprocess.run(["c++", *flags, "-shared", *objects, "-o", library], check=True)
    return library


def check_emulated(folder, cases, flags=(), **environment):
    if "avx2" not in native.usable():
        pytest.skip("AVX-512 is emulated on processors with AVX2.")
    script = SCRIPT.format(library=str(emulated(folder, flags)), cases=cases, sets=SETS)
    done = run(script, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    *kernels, refusal = done.stdout.splitlines()
    assert kernels == ["avx512bf16 3", "avx512vbmi2 0", "avx512f 0"]  # and how many for pairs
    assert refusal == "Kernels avx512f and values in torch.bfloat16 allow no plan of pairs."


def test_avx512_emulated(compiled, tmp_path):
    check_emulated(tmp_path, 20)


@pytest.mark.slow
def test_avx512_emulated_under_sanitizers(compiled, tmp_path):
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    preload = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    check_emulated(tmp_path, 60, flags, LD_PRELOAD=preload.stdout.strip(), ASAN_OPTIONS="detect_leaks=0")


def cases():
    """Packed weights of all kinds, with inputs and a bias."""
    for seed in range(24):
        draw = torch.Generator().manual_seed(seed)
        rows, columns, tokens = (int(torch.randint(1, most, (), generator=draw)) for most in (140, 500, 80))
        tokens = tokens if seed % 2 else 1 + tokens % 9
        dtype = (torch.float32, torch.bfloat16)[seed % 3 == 0]
        weight = weight_of(rows, columns, (0.0, 0.5, 0.9, 1.0)[seed % 4], seed, empty_rows=seed % 3)
        x = torch.randn(tokens, columns, generator=draw).to(dtype)
        bias = torch.randn(rows, generator=draw)
        for packed in packings(weight):
            for many in (0, 1):
                yield packed, many, x, bias


def raw(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


def written(packed, many, x, bias):
    """A case as the driver reads it."""
    name, weight = native.weight(packed)
    numbers = (
        ["bitmask", "indexed", "blocks"].index(name),
        many,
        weight.rows,
        weight.columns,
        x.shape[1],
        len(x),
    )
    types = (weight.type, native.TYPES[x.dtype], getattr(packed, "group", 0))
    buffers = packed.buffers()
    parts = list(buffers.values())[:3]
    all_parts = [*map(raw, parts), raw(buffers["scales"]) if "scales" in buffers else b"", raw(x), raw(bias)]
    return struct.pack("<9q", *map(int, numbers + types)) + b"".join(
        struct.pack("<q", len(part)) + part for part in all_parts
    )


def test_neon_in_an_emulator(tmp_path):
    """The kernels for ARM, whole programs of them."""
    if platform.machine() == "aarch64":
        compiler, emulator = "c++", []
    else:
        compiler, emulator = "aarch64-linux-gnu-g++", ["qemu-aarch64"]
        if not all(map(shutil.which, [compiler, *emulator])):
            skip_or_fail("Debian's g++-aarch64-linux-gnu and qemu-user are needed to run kernels for ARM.")
    flags = ["-std=c++17", "-O2", "-pthread", "-I", SOURCES]
    objects = compiled_sources(compiler, flags, tmp_path)
    program = tmp_path / "driver"
    subprocess.run([compiler, *flags, "-static", HERE / "driver.cpp", *objects, "-o", program], check=True)
    everything = list(cases())
    done = subprocess.run(
        [*emulator, program, "neon"],
        input=b"".join(written(*case) for case in everything),
        capture_output=True,
    )
    assert done.returncode == 0 and done.stderr.decode().strip() == "neon", done.stderr.decode()
    at = 0
    for packed, many, x, bias in everything:
        size = len(x) * packed.shape[0] * x.element_size()
        y = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=x.dtype).view(len(x), -1)
        at += size
        dense = packed.unpack(torch.float64)
        exact = x.double() @ dense.T + bias.double()
        terms = x.double().abs() @ dense.abs().T + bias.double().abs()
        error = ((y.double() - exact).abs() / terms).max().item()
        assert error < LIMITS[x.dtype], (type(packed), packed.values.dtype, many, tuple(x.shape), error)
    assert at == len(done.stdout)
