"""Models with sparse layers in a folder: the same model, other kernels said, damage refused."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.artifacts.manifest import Manifest, fingerprints
from secateur.artifacts.sparse import Sparse
from secateur.core.errors import ArtifactError
from secateur.runtime import Bitmask, Blocks, Indexed, Plan, SparseConv1x1, SparseLinear, native
from secateur.runtime.formats.common import nbytes


def net():
    return nn.Sequential(
        nn.Conv2d(3, 32, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 96, bias=False), nn.Linear(96, 4)
    )


def weight(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    kept = torch.rand(rows, columns, generator=generator) < 0.4
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


FORMATS = {
    "bitmask": lambda w: Bitmask.pack(w),
    "bfloat16": lambda w: Bitmask.pack(w, dtype=torch.bfloat16),
    "int8": lambda w: Bitmask.pack(w, dtype=torch.int8),
    "indexed": lambda w: Indexed.pack(w),
    "blocks": lambda w: Blocks.pack(w),
}


def sparse_net(pack=FORMATS["bitmask"], planned=False):
    torch.manual_seed(0)
    model = net()
    packed = pack(weight(96, 512))
    plan = Plan.of(packed) if planned and native.library() is not None else None
    model[3] = SparseLinear(packed, None, plan, 7 if planned else 2**31 - 1)
    model[0] = SparseConv1x1(pack(weight(32, 3)), torch.linspace(-1, 1, 32), None, 16, (2, 2))
    return model.eval()


X = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_module_comes_back_as_it_was(tmp_path, pack, planned, compressed):
    model = sparse_net(pack, planned)
    sc.save(model, tmp_path, compressed=compressed)
    again = sc.load(tmp_path, net().eval())
    assert torch.equal(again(X), model(X))
    assert again[3].switch == model[3].switch
    assert (again[3].plan is None) == (model[3].plan is None)
    assert type(again[3].packed) is type(model[3].packed)
    assert again[0].stride == (2, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    sc.save(again, tmp_path / "again", surgery=tmp_path)
    assert torch.equal(sc.load(tmp_path / "again", net().eval())(X), model(X))


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(7)[None]


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_a_hugging_face_model(tmp_path, llama, stored, model_dtype):
    llama = type(llama)._from_config(llama.config, dtype=model_dtype).eval()
    sc.prune_(llama, sc.Magnitude(), 0.6)
    fast = sc.runtime.compress(llama, measure=False, dtype=stored)
    assert len(fast.compress_report.converted) == 14
    sc.save(fast, tmp_path)
    again = sc.load(tmp_path)
    assert torch.equal(again(IDS).logits, fast(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.dtype == model_dtype
    assert not again.training
    with pytest.raises(OSError, match="no file named"):
        type(llama).from_pretrained(tmp_path)
    given = type(llama)(llama.config).eval()
    assert torch.equal(sc.load(tmp_path, given)(IDS).logits, fast(IDS).logits)


def test_the_file_is_as_small_as_the_packed_weights(tmp_path, llama):
    sc.prune_(llama, sc.Magnitude(), 0.5)
    fast = sc.runtime.compress(llama, measure=False, dtype=torch.int8)
    sc.save(fast, tmp_path)
    packed = sum(nbytes(m.packed) for m in fast.modules() if isinstance(m, SparseLinear))
    dense = 4 * (64 * 64 + 5 * 64)  # the embedding, and the norms
    assert packed + dense <= (tmp_path / "pruned.safetensors").stat().st_size <= packed + dense + 10_000


def test_a_model_that_was_cut_before(tmp_path, llama):
    report = sc.shrink_(llama, IDS, sc.Budget.macs(0.8))
    sc.prune_(llama, sc.Magnitude(), 0.6)
    fast = sc.runtime.compress(llama, measure=False)
    sc.save(fast, tmp_path, report=report)
    again = sc.load(tmp_path)
    assert any(isinstance(m, SparseLinear) for m in again.modules())
    assert torch.equal(again(IDS).logits, fast(IDS).logits)


def test_masks_are_of_the_dense_model(tmp_path, llama):
    report = sc.prune_(llama, sc.Magnitude(), 0.6)
    fast = sc.runtime.compress(llama, measure=False)
    sc.save(fast, tmp_path, report=report)  # its masks are the zeros that are not stored
    assert not (tmp_path / "masks.safetensors").exists()
    with pytest.raises(ArtifactError, match="this one has sparse layers"):
        sc.save(fast, tmp_path, masks=report.masks)


ELSEWHERE = """
import sys, secateur as sc
from safetensors.torch import save_file
from tests.test_artifacts_sparse import X, net
model = sc.load(sys.argv[1], net().eval())
assert model[3].plan is None
save_file({"y": model(X)}, sys.argv[1] + "/y.safetensors")
"""


def test_other_kernels_are_said(tmp_path):
    model = sparse_net(planned=True)
    sc.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sc.load(tmp_path, net().eval())
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        env=os.environ | {"SECATEUR_KERNELS": "torch"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"made sparse where kernels {native.kernels()} run; here torch do" in done.stderr
    assert torch.allclose(load_file(tmp_path / "y.safetensors")["y"], model(X), atol=1e-4)


def test_a_single_layer_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="The model is a single SparseLinear: put it into a module"):
        sc.save(SparseLinear(Bitmask.pack(weight(8, 8))), tmp_path)


def changed(folder, **fields):
    """The record with other values for the layer "3"; no manifest, as only the record is at stake."""
    step = json.loads((folder / "surgery.json").read_text())["steps"][-1]["sparse"]
    step["layers"]["3"] |= fields
    return step


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [96, 0]},
        {"shape": [96]},
        {"shape": [96, -512]},
        {"shape": [96, 2.0]},
        {"stride": [1]},
        {"stride": "1"},
        {"bias": 1},
        {"plan": "other"},
        {"group": -1},
        {"switch": 2**31},
        {"switch": True},
        {"more": 1},
        {"buffers": []},
        {"buffers": {"mask": ["complex64", [1]]}},
        {"buffers": {"mask": ["uint8", [2**40]]}},
        {"buffers": {"mask": ["uint8", [1, 1, 1]]}},
        {"buffers": {"mask": ["uint8", 1]}},
    ],
)
def test_a_damaged_record_is_refused(tmp_path, fields):
    sc.save(sparse_net(), tmp_path)
    with pytest.raises(ArtifactError, match="record of sparse layers is damaged: what it says of '3'"):
        Sparse.from_dict(changed(tmp_path, **fields))


@pytest.mark.parametrize(
    "data", [None, [], {}, {"kernels": 1}, {"kernels": "a"}, {"kernels": "a", "layers": {}}]
)
def test_what_is_no_record_is_refused(data):
    with pytest.raises(ArtifactError, match="record of sparse layers is damaged"):
        Sparse.from_dict(data)


def rewritten(folder, fields=None, tensors=None):
    """The folder, changed, with a manifest that believes it."""
    path = folder / "model.safetensors"
    found = load_file(path)
    save_file(found | (tensors(found) if tensors else {}), path, {"format": "pt"})
    if fields:
        data = {"format": 1, "steps": [{"sparse": changed(folder, **fields)}]}
        (folder / "surgery.json").write_text(json.dumps(data))
    manifest = Manifest.read(folder)
    files = fingerprints(folder / name for name in manifest.files)
    Manifest(manifest.kind, manifest.class_name, files, manifest.tied, manifest.dtypes, {}).write(folder)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"shape": [96, 448]}, "3 is damaged"),
        ({"stride": [1, 1]}, "3 is"),
        ({"bias": True}, "it lacks 3.bias"),
        ({"buffers": {"starts": ["int64", [25]]}}, "are no weight"),
    ],
)
def test_a_record_of_another_layer_is_refused(tmp_path, fields, complaint):
    sc.save(sparse_net(), tmp_path)
    rewritten(tmp_path, fields)
    model = net().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=complaint):
        sc.load(tmp_path, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert type(model[3]) is nn.Linear


@pytest.mark.parametrize(
    "tensors",
    [
        lambda t: {"3.mask": t["3.mask"] ^ 1},
        lambda t: {"3.mask": t["3.mask"][:-1]},
        lambda t: {"3.starts": t["3.starts"] + 1},
        lambda t: {"3.values": t["3.values"][:-1]},
        lambda t: {"3.values": t["3.values"].double()},
        lambda t: {"0.bias": t["0.bias"][:-1]},
    ],
)
def test_damaged_buffers_are_refused_before_a_kernel_reads_them(tmp_path, tensors):
    sc.save(sparse_net(planned=True), tmp_path)
    rewritten(tmp_path, tensors=tensors)
    model = net().eval()
    with pytest.raises(ArtifactError, match="is damaged"):
        sc.load(tmp_path, model)
    assert type(model[3]) is nn.Linear


def test_another_model_is_refused(tmp_path):
    sc.save(sparse_net(), tmp_path)
    other = nn.Sequential(nn.Conv2d(3, 32, 1, 2), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Linear(96, 4))
    with pytest.raises(ArtifactError, match="3 is no layer of the model that could be sparse"):
        sc.load(tmp_path, other)
    other[3] = nn.Linear(512, 95, bias=False)
    with pytest.raises(ArtifactError, match=r"3 is \(95, 512\), not \(96, 512\)"):
        sc.load(tmp_path, other)
