"""Packing and unpacking are inverse, and damaged buffers are refused before a kernel reads them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import ArtifactError, NonFiniteError, SecateurError
from secateur.runtime.formats import TAIL, Bitmask, Blocks, Indexed
from secateur.runtime.formats.bitmask import STEPS
from secateur.runtime.formats.common import kept, nbytes


def sparse(rows, columns, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) >= sparsity)


SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 300))


@given(SHAPES, st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [Bitmask, Indexed, Blocks])
def test_what_is_packed_is_unpacked_to_the_bit(format, dtype, shape, sparsity, seed):
    weight = sparse(*shape, sparsity, seed).to(dtype)
    packed = format.pack(weight)
    packed.check()
    assert torch.equal(packed.unpack(), weight)
    assert packed.unpack().dtype == dtype
    if format is Blocks:
        blocks = [part.any(0).sum() for part in weight.split(16)]
        assert kept(packed) == 16 * int(sum(blocks))
    else:
        assert kept(packed) == int(weight.count_nonzero())


@given(SHAPES, st.sampled_from([0.3, 0.9]), st.integers(0, 99), st.sampled_from([64, 128]))
def test_int8_is_off_by_half_a_level(shape, sparsity, seed, group):
    weight = sparse(*shape, sparsity, seed)
    packed = Bitmask.pack(weight, dtype=torch.int8, group=group)
    packed.check()
    error = (packed.unpack() - weight).abs()
    for start in range(0, shape[1], group):
        part = slice(start, start + group)
        level = weight[:, part].abs().amax(1, keepdim=True) / 127
        assert bool((error[:, part] <= 0.51 * level).all())
    assert not packed.unpack()[weight == 0].any()


def by_hand(weight, step):
    """The order of the kernels, entry by entry."""
    rows, columns = weight.shape
    padded = np.zeros((-(-rows // 4) * 4, -(-columns // 64) * 64), dtype=np.float32)
    padded[:rows, :columns] = weight.numpy()
    bits, values, starts = [], [], [0]
    for g in range(0, len(padded), 4):
        for j in range(0, padded.shape[1], step):
            for r in range(4):
                for b in range(step):
                    bits.append(padded[g + r, j + b] != 0)
                    if bits[-1]:
                        values.append(padded[g + r, j + b])
        starts.append(len(values))
    return np.packbits(bits, bitorder="little"), values, starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_a_bitmask(dtype):
    weight = sparse(6, 100, 0.5).to(dtype)
    packed = Bitmask.pack(weight)
    mask, values, starts = by_hand(weight.float(), STEPS[dtype])
    assert packed.mask.tolist() == mask.tolist()
    assert packed.values[:-TAIL].tolist() == values
    assert packed.starts.tolist() == starts


def test_explicit_zeros_stay():
    weight = torch.zeros(3, 5)
    keep = torch.zeros(3, 5, dtype=torch.bool)
    keep[1, 2] = keep[2, 4] = True
    for packed in (Bitmask.pack(weight, keep), Indexed.pack(weight, keep)):
        packed.check()
        assert kept(packed) == 2
    assert torch.equal(Bitmask.pack(weight, keep).keep(), keep)


def test_a_half_empty_bfloat16_matrix_has_57_percent_of_its_bytes():
    weight = sparse(512, 1024, 0.5).bfloat16()
    assert nbytes(Bitmask.pack(weight)) <= 0.57 * 2 * weight.numel()


@pytest.mark.parametrize("pack", [Bitmask.pack, Indexed.pack, Blocks.pack])
def test_bad_input(pack):
    with pytest.raises(SecateurError, match=r"Values are stored as float32, bfloat16.*torch.float16"):
        pack(torch.ones(2, 2), dtype=torch.float16)
    with pytest.raises(SecateurError, match="matrix of floating-point numbers"):
        pack(torch.ones(2))
    with pytest.raises(SecateurError, match=r"keep=... has shape \(2, 3\)"):
        pack(torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(NonFiniteError):
        pack(torch.full((2, 2), float("nan")))


def test_bad_groups_and_too_many_columns():
    with pytest.raises(SecateurError, match="multiple of 64"):
        Bitmask.pack(torch.ones(2, 2), dtype=torch.int8, group=96)
    with pytest.raises(SecateurError, match="65536 columns"):
        Indexed.pack(torch.ones(1, 2**16 + 1))
    with pytest.raises(SecateurError, match="65536 columns"):
        Blocks.pack(torch.ones(1, 2**16 + 1))


BITMASK = Bitmask.pack(sparse(9, 130, 0.6))
INT8 = Bitmask.pack(sparse(9, 130, 0.6), dtype=torch.int8)
INDEXED = Indexed.pack(sparse(9, 130, 0.6))
BLOCKS = Blocks.pack(sparse(40, 130, 0.9))


def changed(buffer, at, value):
    buffer = buffer.clone()
    buffer.view(-1)[at] = value
    return buffer


@pytest.mark.parametrize(
    ("packed", "change", "complaint"),
    [
        (BITMASK, {"shape": (13, 130)}, "its mask are"),
        (BITMASK, {"shape": (10, 130)}, None),  # a row of the padding: harmless, and not to be told
        (BITMASK, {"shape": (9, 128)}, "mask are"),
        (BITMASK, {"shape": (8, 130)}, "mask are"),
        (BITMASK, {"shape": (0, 130)}, "its shape is"),
        (BITMASK, {"shape": (-9, -130)}, "its shape is"),
        (BITMASK, {"values": BITMASK.values[1:]}, "do not agree"),
        (BITMASK, {"values": BITMASK.values[:10]}, "its values have shape"),
        (BITMASK, {"values": BITMASK.values.double()}, "its values are torch.float64"),
        (BITMASK, {"values": BITMASK.values.bfloat16()}, "outside its shape"),
        (BITMASK, {"mask": changed(BITMASK.mask, 3, 255)}, "do not agree"),
        (BITMASK, {"mask": BITMASK.mask[:-1]}, "its mask are"),
        (BITMASK, {"starts": changed(BITMASK.starts, 1, 2**62)}, "do not agree"),
        (BITMASK, {"starts": changed(BITMASK.starts, 0, -8)}, "do not agree"),
        (BITMASK, {"starts": BITMASK.starts.int()}, "its starts are torch.int32"),
        (BITMASK, {"group": 64}, "group 64"),
        (BITMASK, {"scales": torch.ones(12, 2).bfloat16()}, "group 0"),
        (INT8, {"group": 63}, "group 63"),
        (INT8, {"group": 0}, "group 0"),
        (INT8, {"scales": INT8.scales[:-1]}, "its scales are"),
        (INT8, {"scales": None}, "group 128"),
        (INDEXED, {"indices": changed(INDEXED.indices, 5, 130)}, "column 130 of 130|do not rise"),
        (INDEXED, {"indices": changed(INDEXED.indices, -1, -1)}, "column 65535 of 130"),
        (INDEXED, {"indices": INDEXED.indices[1:]}, "its indices are"),
        (INDEXED, {"indices": INDEXED.indices.flip(0)}, "do not rise"),
        (INDEXED, {"starts": changed(INDEXED.starts, 1, 2**40)}, "offsets do not rise"),
        (INDEXED, {"starts": changed(INDEXED.starts, -1, 2**40)}, "offsets do not rise"),
        (INDEXED, {"shape": (9, 100)}, "of 100"),
        (INDEXED, {"values": INDEXED.values[:-1]}, "its indices are"),
        (BLOCKS, {"columns": changed(BLOCKS.columns, 5, 130)}, "column 130 of 130|do not rise"),
        (BLOCKS, {"columns": BLOCKS.columns[1:]}, "its columns are"),
        (BLOCKS, {"columns": BLOCKS.columns.flip(0)}, "do not rise"),
        (BLOCKS, {"starts": changed(BLOCKS.starts, 1, 2**40)}, "offsets do not rise"),
        (BLOCKS, {"starts": BLOCKS.starts[:-1]}, "its starts are"),
        (BLOCKS, {"shape": (40, 100)}, "of 100"),
        (BLOCKS, {"shape": (60, 130)}, "its starts are"),
        (BLOCKS, {"shape": (36, 130)}, "in rows outside its shape"),
        (BLOCKS, {"values": BLOCKS.values[:-1]}, "not in blocks of 16"),
        (BLOCKS, {"values": BLOCKS.values[:-16]}, "its columns are"),
        (BLOCKS, {"values": BLOCKS.values.double()}, "its values are torch.float64"),
    ],
)
def test_damage_is_refused(packed, change, complaint):
    damaged = dataclasses.replace(packed, **change)
    if complaint is None:
        damaged.check()
        return
    with pytest.raises(ArtifactError, match=complaint):
        damaged.check("fc")


@given(st.data())
def test_fuzzed_buffers_are_refused_or_harmless(data):
    """One bit of the layout turned over: `check` complains, or only values changed."""
    packed = data.draw(st.sampled_from([BITMASK, INT8, INDEXED, BLOCKS]))
    name = data.draw(st.sampled_from([n for n in packed.buffers() if n not in ("values", "scales")]))
    raw = packed.buffers()[name].clone().view(torch.uint8)
    at, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw[at] ^= 1 << bit
    damaged = dataclasses.replace(packed, **{name: raw.view(packed.buffers()[name].dtype)})
    try:
        damaged.check()
    except ArtifactError:
        return
    assert name in ("indices", "columns")  # another column, still rising and inside
    assert damaged.unpack().shape == packed.unpack().shape
