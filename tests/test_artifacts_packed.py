"""Compressed artifacts: smaller files, the same model to the bit, damage refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.artifacts.packed import pack_file, read_packed
from secateur.artifacts.shards import Shards
from secateur.core.errors import ArtifactError


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32]
    ),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_files_keep_every_bit(tmp_path_factory, shape, dtype, sparsity, seed):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensor = (
        torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > sparsity)
    ).to(dtype)
    if tensor.numel() > 2 and dtype.is_floating_point and tensor.element_size() > 1:
        tensor.view(-1)[:2] = torch.tensor([-0.0, float("nan")]).to(dtype)
    save_file({"w": tensor, "plain": torch.arange(3)}, path)
    pack_file(path)
    assert not path.exists()
    found = read_packed(path.with_name("model.packed.safetensors"))
    assert found.keys() == {"w", "plain"}
    assert found["w"].shape == tensor.shape
    assert found["w"].dtype == dtype
    assert torch.equal(bits(found["w"]), bits(tensor))


def net():
    return nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(256, 512, bias=False), nn.Linear(512, 4)
    )


def pruned(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = net().to(dtype)
    report = sc.prune_(model, sc.Magnitude(), 0.5)
    return model, report


def test_a_module_comes_back_dense_and_equal(tmp_path):
    model, report = pruned()
    sc.save(model, tmp_path, report=report, compressed=True)
    assert not (tmp_path / "model.safetensors").exists()
    again = sc.load(tmp_path, net())
    for name, tensor in model.state_dict().items():
        assert torch.equal(bits(again.state_dict()[name]), bits(tensor)), name
    sc.Masks.load(tmp_path / "masks.safetensors").check(again)


def test_half_of_a_bfloat16_model_takes_57_percent(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 4)).bfloat16()
    sc.prune_(model, sc.Magnitude(), 0.5)
    sc.save(model, tmp_path / "plain")
    sc.save(model, tmp_path / "small", compressed=True)
    plain = (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert (tmp_path / "small" / "model.packed.safetensors").stat().st_size <= 0.57 * plain


def test_saving_plainly_again_replaces_the_packed_file(tmp_path):
    model, _ = pruned()
    sc.save(model, tmp_path, compressed=True)
    sc.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "secateur.json"]


@pytest.fixture
def llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    sc.prune_(model, sc.Magnitude(), 0.6)
    return model


def test_a_hugging_face_model(tmp_path, llama):
    sc.save(llama, tmp_path, compressed=True)
    again = sc.load(tmp_path)
    ids = torch.arange(7)[None]
    assert torch.equal(again(ids).logits, llama(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with pytest.raises(OSError, match="no file named"):
        type(llama).from_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="is compressed, and cannot be read piece by piece"):
        Shards.open(tmp_path)


def test_a_cut_hugging_face_model(tmp_path, llama):
    """Layers of different widths, which only `load` opens."""
    ids = torch.arange(7)[None]
    report = sc.shrink_(llama, ids, sc.Budget.macs(0.8))
    sc.save(llama, tmp_path, report=report, compressed=True)
    assert (tmp_path / "pruned.packed.safetensors").is_file()
    assert torch.equal(sc.load(tmp_path)(ids).logits, llama(ids).logits)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"2.weight/mask": None}, "parts of it are missing"),
        ({"2.weight/values": None}, "parts of it are missing"),
        ({"2.weight": torch.ones(1)}, "missing or doubled"),
        ({"2.weight/mask": torch.full((16384,), 255, dtype=torch.uint8)}, "its mask and its values disagree"),
        ({"2.weight/mask": torch.zeros(16383, dtype=torch.uint8)}, "not that of 131072 entries"),
        ({"2.weight/mask": torch.zeros(16384)}, "not that of 131072 entries"),
        ({"shapes": {"2.weight": [512, 257]}}, "not that of 131584 entries"),
        ({"shapes": {"2.weight": [-512, -256]}}, "missing or doubled"),
        ({"shapes": {"2.weight": [2**47, 2**47]}}, "not that of"),
        ({"shapes": {"2.weight": "512"}}, "missing or doubled"),
        ({"shapes": []}, "is not a packed file of this format"),
    ],
)
def test_damage_is_refused(tmp_path, change, complaint):
    model, _ = pruned()
    sc.save(model, tmp_path, compressed=True)
    path = tmp_path / "model.packed.safetensors"
    with safe_open(path, framework="pt") as f:
        meta = f.metadata()
    tensors = load_file(path)
    if "shapes" in change:
        shapes = change["shapes"]
        packed = json.loads(meta["packed"])
        meta["packed"] = json.dumps(packed | shapes if isinstance(shapes, dict) else shapes)
    else:
        tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    save_file(tensors, path, meta)
    with pytest.raises(ArtifactError, match=complaint):
        read_packed(path)


@given(st.data())
def test_fuzzed_files_are_refused_or_of_the_right_shapes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"w": torch.eye(9), "v": torch.ones(3)}, path)
    pack_file(path)
    packed = path.with_name("model.packed.safetensors")
    raw = bytearray(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    packed.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 5]))])
    try:
        found = read_packed(packed)
    except ArtifactError:
        return
    for tensor in found.values():
        assert tensor.numel() < 10_000
