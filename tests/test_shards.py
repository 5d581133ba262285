"""Shards and mask files in parts: the same bytes as safetensors', no more memory, no trust in a header."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from secateur import ArtifactError, Masks
from secateur.artifacts.mask_file import MaskFile
from secateur.artifacts.parts import refusing
from secateur.artifacts.shards import Shards
from secateur.core.files import replacing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all, NaNs among them; only a bool is 0 or 1."""
    found = torch.empty(shape, dtype=dtype)
    values = 2 if dtype == torch.bool else 256
    raw = np.random.default_rng(seed).integers(0, values, found.nbytes, dtype=np.uint8)
    found.view(-1).view(torch.uint8).numpy()[:] = raw
    return found


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(max_size=5), min_size=1, max_size=5, unique=True))
    dtypes = st.sampled_from(list(DTYPES.values()))
    return {name: random(draw(SHAPES), draw(dtypes), seed) for seed, name in enumerate(names)}


def bits(found: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    raw = {name: t.contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in found.items()}
    return {name: (t.dtype, tuple(t.shape), raw[name].tobytes()) for name, t in found.items()}


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, every write behind this size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_shards(path: Path, *shards: Mapping[str, Tensor]) -> Path:
    """A folder with these tensors in one file each, and their index."""
    path.mkdir(exist_ok=True)
    index = {}
    for i, shard in enumerate(filter(None, shards)):
        save_file(dict(shard), path / f"part-{i}.safetensors")
        index.update({name: f"part-{i}.safetensors" for name in shard})
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    return path


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    ones = {"a": random((64, 96), torch.bfloat16, 1), "b": random((7,), torch.float8_e4m3fn, 2)}
    return write_shards(tmp_path / "source", ones, {"c": random((90, 90), torch.float32, 3)})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


# ------ reading


@given(tensors())
def test_every_tensor_is_read_as_safetensors_reads_it(saved):
    with folder() as path:
        save_file(saved, path / WEIGHTS, {"format": "pt"})
        shards = Shards.open(path)
        found = shards.read_many(shards.names)
        assert bits(found) == bits(saved) == bits(load_file(path / WEIGHTS))
        for name, t in saved.items():
            entry = shards.entry(name)
            assert (entry.dtype, entry.shape, entry.bytes) == (t.dtype, tuple(t.shape), t.nbytes)
            assert bits({name: shards.read(name)}) == bits({name: t})
        assert shards.total_bytes == sum(t.nbytes for t in saved.values())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_every_dtype_in_every_shape(name, shape, tmp_path):
    old, new = random(shape, DTYPES[name], 1), random(shape, DTYPES[name], 2)
    save_file({"t": old}, tmp_path / WEIGHTS)
    assert name in (tmp_path / WEIGHTS).read_bytes().decode("latin-1")
    shards = Shards.open(tmp_path)
    assert bits({"t": shards.read("t")}) == bits({"t": old})
    shards.write("t", new)
    assert bits({"t": shards.read("t")}) == bits({"t": new}) == bits(load_file(tmp_path / WEIGHTS))


def test_tensors_read_are_independent_of_the_file_and_of_each_other(source):
    shards = Shards.open(source)
    before = contents(source)
    first, second = shards.read("c"), shards.read("c")
    first.zero_()
    assert second.count_nonzero() and contents(source) == before
    (source / "part-1.safetensors").unlink()
    assert second.count_nonzero()


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_transformers(tied, source, target):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    path = source.parent / "llama"
    model.save_pretrained(path, max_shard_size="8KB")
    shards = Shards.open(path)
    assert len(shards.files) > 4 and INDEX in shards.files
    stored = [n for n in model.state_dict() if not (tied and n == "lm_head.weight")]
    assert bits(shards.read_many(shards.names)) == bits({n: model.state_dict()[n] for n in sorted(stored)})

    copies = shards.copy_files(target)
    shutil.copy(path / "config.json", target)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data[parameter < 0] = 0
            copies.write(name, parameter)
    copies.flush()
    again = transformers.LlamaForCausalLM.from_pretrained(target, dtype="auto")
    assert bits(again.state_dict()) == bits(model.state_dict())


# ------ copying and overwriting


@settings(max_examples=40)  # each waits for the disk
@given(tensors(), st.data())
def test_only_the_overwritten_tensors_change(saved, data):
    names = data.draw(st.lists(st.sampled_from(sorted(saved)), unique=True))
    with folder() as path:
        half = len(saved) // 2
        items = list(saved.items())
        write_shards(path, dict(items[half:]), dict(items[:half]))
        before = contents(path)
        (path / "out").mkdir()
        copies = Shards.open(path).copy_files(path / "out")
        assert contents(path / "out") == before
        for seed, name in enumerate(names):
            saved[name] = random(tuple(saved[name].shape), saved[name].dtype, 100 + seed)
            copies.write(name, saved[name])
        copies.flush()
        found: dict[str, Tensor] = {}
        for file in (path / "out").glob("*.safetensors"):
            found.update(load_file(file))
        assert bits(found) == bits({name: saved[name] for name in found}) and found.keys() == saved.keys()
        shutil.rmtree(path / "out")
        assert contents(path) == before


def test_a_tensor_of_any_strides_is_written(source):
    shards = Shards.open(source)
    for new in (torch.randn(90, 90).T.requires_grad_(), torch.ones(()).expand(90, 90)):
        shards.write("c", new)
        assert torch.equal(shards.read("c"), new)
    save_file({"none": torch.zeros(0)}, source / WEIGHTS)
    Shards.open(source).write("none", torch.zeros(0).as_strided((0,), (0,)))


def test_what_does_not_fit_is_not_written(source):
    shards, before = Shards.open(source), contents(source)
    for wrong, message in (
        (torch.zeros(90, 90, dtype=torch.bfloat16), "torch.float32 (90, 90)"),
        (torch.zeros(8100), "was given as torch.float32 (8100,)"),
    ):
        with pytest.raises(ArtifactError, match="part-1") as refused:
            shards.write("c", wrong)
        assert message in str(refused.value)
    for call in (
        lambda: shards.write("d", torch.zeros(1)),
        lambda: shards.read("d"),
        lambda: shards.entry("d"),
    ):
        with pytest.raises(ArtifactError, match="no tensor d"):
            call()
    assert contents(source) == before


def test_a_resumed_copy_keeps_what_was_written(source, target):
    shards = Shards.open(source)
    first = shards.copy_files(target)
    first.write("c", torch.zeros(90, 90))
    first.flush()
    (target / "part-0.safetensors").write_bytes(b"cut short")
    second = shards.copy_files(target, resume=True)
    assert not second.read("c").any()
    assert bits({"a": second.read("a")}) == bits({"a": shards.read("a")})
    assert shards.copy_files(target).read("c").any()
    assert contents(target) == contents(source)


def test_what_a_killed_copy_leaves_is_removed(source, target):
    killed = replacing(target / "part-0.safetensors")
    leftover = killed.__enter__()
    leftover.write_bytes(b"half")
    (target / ".keep").touch()
    Shards.open(source).copy_files(target, resume=True)
    assert sorted(contents(target)) == sorted([".keep", *contents(source)])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_is_written_does_not_follow_links(link, source, target):
    cache = source if link is os.link else Path(shutil.copytree(source, source.parent / "cache"))
    link(cache / "part-1.safetensors", target / "part-1.safetensors")
    before = contents(cache)
    copies = Shards.open(source).copy_files(target, resume=True)
    copies.write("c", torch.zeros(90, 90))
    assert contents(cache) == before and not copies.read("c").any()


def test_targets_that_would_mislead_are_refused(source, target):
    shards = Shards.open(source)
    with pytest.raises(ArtifactError, match="no folder"):
        shards.copy_files(target / "missing")
    with pytest.raises(ArtifactError, match="come from"):
        shards.copy_files(source)
    save_file({"x": torch.zeros(1)}, target / WEIGHTS)
    with pytest.raises(ArtifactError, match="another model"):
        shards.copy_files(target)
    (target / WEIGHTS).unlink()
    # The same file size, but other tensors in it.
    changed = {"c": random((81, 100), torch.float32)}
    save_file(changed, target / "part-1.safetensors")
    sizes = [(path / "part-1.safetensors").stat().st_size for path in (source, target)]
    assert sizes[0] == sizes[1]
    with pytest.raises(ArtifactError, match="other weights"):
        shards.copy_files(target, resume=True)


# ------ disks


def test_a_disk_too_small_is_refused_before_anything_is_copied(tmp_path, target):
    size = shutil.disk_usage(tmp_path).free + 50_000_000
    header = {"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    (tmp_path / WEIGHTS).write_bytes(with_header(header))
    with open(tmp_path / WEIGHTS, "r+b") as f:
        f.truncate(f.seek(0, os.SEEK_END) + size)  # a hole, which takes no space
    with pytest.raises(ArtifactError, match=r"need [\d,.]+ GB, but the disk of .* has [\d,.]+ GB free"):
        Shards.open(tmp_path).copy_files(target)
    assert not contents(target)


def test_a_disk_that_fills_up_leaves_no_half_file(source, target):
    shards = Shards.open(source)
    with largest_file(20_000), pytest.raises(ArtifactError, match=r"part-1.*cannot be copied.*free space"):
        shards.copy_files(target)
    assert list(contents(target)) == ["part-0.safetensors"]  # the smaller one, whole
    shards.copy_files(target, resume=True)
    assert contents(target) == contents(source)


def test_a_failed_write_is_one_sentence(source):
    shards = Shards.open(source)
    with largest_file(1_000), pytest.raises(ArtifactError, match=r"part-1.*cannot be written.*free space"):
        shards.write("c", torch.zeros(90, 90))
    shards.write("c", torch.zeros(90, 90))
    assert not shards.read("c").any()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="The system has no /dev/full.")
def test_no_space_left_is_an_artifact_error():
    with (
        pytest.raises(ArtifactError, match="It fails: No space left on device; free space"),
        refusing("It fails"),
    ):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")


def test_a_file_cut_short_later_is_named(source):
    shards = Shards.open(source)
    os.truncate(source / "part-1.safetensors", 10_000)
    with pytest.raises(ArtifactError, match=r"part-1.*truncated"):
        shards.read("c")
    with pytest.raises(ArtifactError, match=r"part-1.*truncated"):
        shards.write("c", torch.zeros(90, 90))
    assert (source / "part-1.safetensors").stat().st_size == 10_000
    (source / "part-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"part-1.*cannot be read"):
        shards.read("c")


# ------ memory

LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from secateur import Masks
from secateur.artifacts.mask_file import MaskFile
from secateur.artifacts.shards import Shards

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def peak(f):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the earlier peak
    before = status("VmRSS")
    f()
    return status("VmHWM") - before

torch.set_num_threads(1)
folder = Path(sys.argv[1])
(folder / "out").mkdir()
space = status("VmSize") + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (space, space))
small = torch.ones(3)
shards = Shards.open(folder)
bits = MaskFile.create(folder / "masks", {"large": (2**15, 2**15), "small": (3,)})
peaks = {"read": peak(lambda: shards.read("small")), "copy": peak(lambda: shards.copy_files(folder / "out"))}
copies = Shards.open(folder / "out")
peaks["write"] = peak(lambda: (copies.write("small", small), copies.flush()))
peaks["masks"] = peak(lambda: (bits.write("small", small > 0), bits.finish()))
assert copies.read("small").equal(small)
refused = []
for load in (lambda: load_file(folder / "model.safetensors"), lambda: shards.read("large"),
             lambda: Masks.load(folder / "masks")):
    try:
        load()
    except Exception as error:
        refused.append(type(error).__name__)
print(json.dumps([peaks, refused]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Reads /proc.")
def test_small_parts_of_large_files_take_little_memory(tmp_path):
    size = 300 * 2**20
    header = {
        "large": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [3], "data_offsets": [size, size + 12]},
    }
    (tmp_path / WEIGHTS).write_bytes(with_header(header))
    os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size + size + 12)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks, refused = json.loads(done.stdout)
    assert len(refused) == 3, "the limit does not bite"
    assert peaks["read"] < 2e6 and peaks["write"] < 2e6
    assert max(peaks.values()) < 16e6, peaks


# ------ headers of strangers

SOUND = {
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "v": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}


def changed(name: str, **fields: object) -> dict[str, object]:
    return {**SOUND, name: {**SOUND[name], **fields}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "length of a header"),
        (b"\x10\0\0", "length of a header"),
        (struct.pack("<Q", 2**63) + b"{}", "length of a header"),
        (struct.pack("<Q", 100_000_001) + b"{}", "length of a header"),
        (struct.pack("<Q", 3) + b"{}", "truncated"),
        (with_header(b"[]"), "no JSON object"),
        (with_header(b'"w"'), "no JSON object"),
        (with_header(b" {}"), "no JSON object"),
        (with_header(b""), "no JSON object"),
        (with_header(b"{}}"), "no valid JSON"),
        (with_header(b'{"\xff":1}'), "no valid JSON"),
        (with_header(b'{"\\ud800":1}'), "no valid JSON"),
        (with_header(b'{"a":' + b"[" * 100_000), "no valid JSON"),
        (with_header(b'{"a":1' + b"0" * 5000 + b"}"), "no valid JSON"),
        (with_header(b'{"w":{},"w":{}}'), "twice"),
        (with_header({**SOUND, "__metadata__": {"format": 1}}, bytes(32)), "metadata"),
        (with_header({**SOUND, "__metadata__": ["pt"]}, bytes(32)), "metadata"),
        (with_header({"w": 1}), "dtype and shape"),
        (with_header(changed("w", dtype=None), bytes(32)), "dtype and shape"),
        (with_header(changed("w", dtype=["F32"]), bytes(32)), "dtype and shape"),
        (with_header(changed("w", dtype="F4"), bytes(32)), "none of F64"),
        (with_header(changed("w", dtype="\x1b[2J"), bytes(32)), r"'\\x1b\[2J'"),
        (with_header(changed("w", shape="23"), bytes(32)), "dtype and shape"),
        (with_header(changed("w", shape=[2, 3.0]), bytes(32)), "dtype and shape"),
        (with_header(changed("w", shape=[6, True]), bytes(32)), "dtype and shape"),
        (with_header(changed("w", shape=[-2, -3]), bytes(32)), "dtype and shape"),
        (with_header(changed("w", shape=[1] * 65 + [6]), bytes(32)), "dtype and shape"),
        (
            with_header({"w": {"dtype": "U8", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}),
            "dtype and shape",
        ),
        (with_header(changed("w", shape=[2, 2]), bytes(32)), "do not fit"),
        (with_header(changed("w", data_offsets=[24, 0]), bytes(32)), "do not fit"),
        (with_header(changed("w", data_offsets=[0]), bytes(32)), "data_offsets"),
        (with_header(changed("w", data_offsets=[-24, 0]), bytes(32)), "data_offsets"),
        (with_header(changed("w", data_offsets=[0, 24.0]), bytes(32)), "data_offsets"),
        (with_header(changed("v", data_offsets=[16, 24]), bytes(24)), "overlaps"),
        (with_header(changed("v", data_offsets=[32, 40]), bytes(40)), "gap"),
        (with_header(SOUND, bytes(31)), "truncated"),
        (with_header(SOUND, bytes(33)), "1 bytes follow"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsound_header_is_refused_and_its_file_named(content, message, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as refused:
        Shards.open(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(refused.value) and len(str(refused.value)) < 1000


def check_like_safetensors(path: Path) -> None:
    """Refused, or read as the library reads it."""
    try:
        shards = Shards.open(path)
        found = shards.read_many(shards.names)
    except ArtifactError:
        return
    assert bits(found) == bits(load((path / WEIGHTS).read_bytes()))


@settings(max_examples=300)
@given(st.data())
def test_flipped_and_missing_bytes(data):
    content = bytearray(with_header(SOUND, bytes(range(32))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    with folder() as path:
        (path / WEIGHTS).write_bytes(content[:cut])
        check_like_safetensors(path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3) | st.just(2**63),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = {
    "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "BOOL"]) | JUNK,
    "shape": st.lists(st.integers(0, 4), max_size=3) | JUNK,
    "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | JUNK,
}


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from("abc"), st.fixed_dictionaries(FIELDS) | JUNK, max_size=3),
    st.binary(max_size=16).map(lambda data: bytes(b & 1 for b in data)),
)
def test_headers_of_any_json(header, data):
    with folder() as path:
        (path / WEIGHTS).write_bytes(with_header(header, data))
        check_like_safetensors(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": 0, "c": 1}, "part-0.safetensors holds b, which .* does not list"),
        ({"a": 0, "b": 1, "c": 1}, "lists 'b' in part-1.safetensors, which does not hold it"),
        ({"a": 0, "b": 0, "c": 0}, "lists 'c' in part-0.safetensors, which does not hold it"),
        ({"a": 0, "b": 0, "c": 1, "d": 1}, "lists 'd' in part-1.safetensors, which does not hold it"),
        ({"a": 0, "b": 0, "c": 1, "d": 2}, "part-2.safetensors is missing"),
    ],
)
def test_an_index_that_contradicts_its_shards(index, message, source):
    files = {name: f"part-{i}.safetensors" for name, i in index.items()}
    (source / INDEX).write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ArtifactError, match=message):
        Shards.open(source)


def test_a_name_in_two_shards(source):
    save_file({"c": torch.zeros(1), "b": torch.zeros(1)}, source / "part-1.safetensors")
    with pytest.raises(ArtifactError, match=r"part-1.safetensors holds b, which another shard holds too"):
        Shards.open(source)


# ------ mask files


@st.composite
def masks(draw: st.DrawFn) -> Masks:
    names = draw(st.lists(st.text(max_size=5), max_size=4, unique=True))
    return Masks({name: random(draw(SHAPES), torch.bool, seed) for seed, name in enumerate(names)})


def shapes_of(masks: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(mask.shape) for name, mask in masks.items()}


@settings(max_examples=40)  # each waits for the disk
@given(masks(), st.randoms(use_true_random=False))
def test_a_mask_file_is_what_masks_save_writes(whole, order):
    names = list(whole)
    order.shuffle(names)
    with folder() as path:
        whole.save(path / "whole")
        file = MaskFile.create(path / "parts", shapes_of(whole))
        for name in names:
            file.write(name, whole[name])
        file.finish()
        found = Masks.load(path / "parts")
        assert found == whole and list(found) == list(whole)
        with safe_open(path / "whole", "np") as a, safe_open(path / "parts", "np") as b:
            assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
            assert all(np.array_equal(a.get_tensor(name), b.get_tensor(name)) for name in names)
        assert sorted(contents(path)) == ["parts", "whole"]


@settings(max_examples=40)  # each waits for the disk
@given(masks(), st.data())
def test_a_mask_file_is_continued_after_a_crash(whole, data):
    done = data.draw(st.integers(0, len(whole)))
    with folder() as path:
        for name, stop in (("at once", len(whole)), ("resumed", done)):
            file = MaskFile.create(path / name, shapes_of(whole))
            for i, (mask_name, mask) in enumerate(whole.items()):
                if i == stop:
                    with pytest.raises(ArtifactError, match="checksum"):
                        Masks.load(path / name)
                    file = MaskFile.open(path / name)
                file.write(mask_name, mask)
            file.finish()
        assert (path / "resumed").read_bytes() == (path / "at once").read_bytes()
        MaskFile.open(path / "resumed").finish()
        assert (path / "resumed").read_bytes() == (path / "at once").read_bytes()
        assert Masks.load(path / "resumed") == whole


def test_masks_larger_than_a_chunk_and_of_any_strides(tmp_path):
    large = (torch.arange(35_000_000) % 3 == 0).view(5_000, 7_000).T
    file = MaskFile.create(tmp_path / "masks", {"large": (7_000, 5_000), "none": (2, 3)})
    file.write("large", large)
    file.finish()
    found = Masks.load(tmp_path / "masks")
    assert torch.equal(found["large"], large) and not found["none"].any()


def test_masks_that_do_not_fit_are_not_written(tmp_path):
    file = MaskFile.create(tmp_path / "masks", {"w": (2, 3)})
    before = contents(tmp_path)
    for name, mask, message in (
        ("v", torch.ones(2, 3).bool(), "without a mask of v"),
        ("w", torch.ones(6).bool(), r"torch.bool \(6,\), not boolean \(2, 3\)"),
        ("w", torch.ones(2, 3), "torch.float32"),
    ):
        with pytest.raises(ArtifactError, match=message):
            file.write(name, mask)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_mask_file_that_could_not_be_read_is_not_made(name, tmp_path):
    with pytest.raises((ArtifactError, UnicodeEncodeError)):
        MaskFile.create(tmp_path / "masks", {name: (2,)})
    assert not contents(tmp_path)


def test_a_full_disk_while_masks_are_written(tmp_path):
    with largest_file(100), pytest.raises(ArtifactError, match=r"cannot be written.*free space"):
        MaskFile.create(tmp_path / "masks", {"w": (9_000,)})
    assert not contents(tmp_path)
    file = MaskFile.create(tmp_path / "masks", {"w": (9_000,)})
    with largest_file(100), pytest.raises(ArtifactError, match=r"cannot be written.*free space"):
        file.write("w", torch.ones(9_000).bool())


def test_what_is_no_mask_file_is_not_continued(tmp_path):
    path = tmp_path / "masks"
    with pytest.raises(ArtifactError, match="no mask file"):
        MaskFile.open(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="not a mask file"):
        MaskFile.open(path)
    file = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    for shapes in ("", "[]", '{"w": 3}', '{"w": [4, 4]}', '{"w": [-3]}', '{"v": [3]}', "[" * 100_000):
        meta = {"format": "secateur-masks-1", "sha256": "0" * 64, "shapes": shapes}
        path.write_bytes(with_header({"__metadata__": meta, "w": file}, b"\0"))
        with pytest.raises(ArtifactError, match="make it anew"):
            MaskFile.open(path)
    # Longer or shorter than a checksum, which would move the data when it is entered.
    for digest in ("", "0" * 63, "0" * 72, '"' * 64):
        meta = {"format": "secateur-masks-1", "sha256": digest, "shapes": '{"w": [3]}'}
        text = json.dumps({"__metadata__": meta, "w": file}, separators=(",", ":")).encode()
        path.write_bytes(with_header(text + b" " * (-len(text) % 8), b"\0"))
        with pytest.raises(ArtifactError, match="make it anew"):
            MaskFile.open(path)


@settings(max_examples=80)
@given(st.data())
def test_flipped_bytes_of_a_mask_file(data):
    with folder() as path:
        file = MaskFile.create(path / "masks", {"v": (9,), "w": (3, 5)})
        file.finish()
        content = bytearray((path / "masks").read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        (path / "masks").write_bytes(
            content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
        )
        try:
            again = MaskFile.open(path / "masks")
        except ArtifactError:
            return
        written = Masks({name: random(shape, torch.bool) for name, shape in again.shapes.items()})
        for name, mask in written.items():
            again.write(name, mask)
        again.finish()
        assert Masks.load(path / "masks") == written
