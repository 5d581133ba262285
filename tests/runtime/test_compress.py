"""Whole models with sparse layers: the same function, an honest report."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import SecateurError, SelectionError
from secateur.runtime import (
    CompressReport,
    LayerReport,
    SparseConv1x1,
    SparseLinear,
    compress,
    compress_,
    native,
)
from secateur.runtime.choose import Choice, formats
from secateur.runtime.compress import MARGIN


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.point = nn.Conv2d(16, 64, 1, bias=False)
        self.wide = nn.Conv2d(64, 32, 3)
        self.first = nn.Linear(32, 96)
        self.second = nn.Linear(96, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.point(x)))).mean((-1, -2))
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    sc.prune_(model, sc.Magnitude(), 0.7)
    return model


def test_the_model_computes_the_same(net):
    x = torch.randn(3, 16, 8, 8)
    expected = net(x)
    fast = compress(net, measure=False)
    assert isinstance(fast.point, SparseConv1x1)
    assert isinstance(fast.first, SparseLinear)
    assert torch.allclose(fast(x), expected, atol=1e-5)
    assert type(net.first) is nn.Linear  # a copy was changed
    report = {r.name: r for r in fast.compress_report.layers}
    assert set(report) == {"point", "first", "second", "head"}
    assert report["head"].reason == "less than 30% zeros"
    assert report["first"].format == "bitmask"
    assert report["first"].error == 0
    assert report["first"].sparsity == pytest.approx(0.7, abs=0.001)
    assert fast.compress_report.packed_bytes < 0.5 * fast.compress_report.dense_bytes


def test_narrowed_values_say_their_error(net):
    report = compress_(net, dtype=torch.int8, measure=False)
    first = next(r for r in report.layers if r.name == "first")
    assert first.dtype == "int8"
    assert 0 < first.error < 1 / 200
    assert next(r for r in report.layers if r.name == "head").dtype == "float32"


def test_formats_that_are_tried():
    weight = torch.randn(64, 96)
    few = weight * (torch.rand(64, 96) >= 0.8)
    blocks = weight * sc.Block(16, 1).keep(weight.abs(), 0.4)
    assert formats(weight * (torch.rand(64, 96) >= 0.5), torch.float32) == ["bitmask"]
    assert formats(few, torch.bfloat16) == ["bitmask", "indexed"]
    assert formats(blocks, torch.float32) == ["bitmask", "blocks"]
    assert formats(blocks, torch.int8) == ["bitmask"]
    assert formats(0 * weight, torch.float32) == ["bitmask", "indexed"]


@pytest.mark.parametrize("planned", [False, True])
def test_a_model_pruned_in_blocks(planned, net, compiled):
    """As `compress` makes its layers where blocks are the fastest."""
    sc.prune_(net, sc.Magnitude(), 0.7, pattern=sc.Block(16, 1), where=sc.Where(include="first"))
    x = torch.randn(40, 32)
    expected = net.first(x)
    choice = Choice("blocks", torch.float32, planned, False, 8, {})
    sparse = choice.build(net.first.weight, net.first.bias, None)
    assert torch.allclose(sparse(x), expected, atol=1e-5)
    assert torch.allclose(sparse(x[:2]), expected[:2], atol=1e-5)
    assert "blocks, float32, sparsity=69.8%" in str(sparse)


def test_no_layer_is_converted_that_is_not_faster(net, compiled):
    report = compress_(net, tokens=(1, 40), memory=3.0)
    for r in report.layers:
        if r.format is not None:
            assert min(r.speedup.values()) >= MARGIN
            assert set(r.speedup) == {1, 40}
        else:
            assert r.reason in ("dense is faster", "less than 30% zeros")
            assert r.packed_bytes == r.dense_bytes
    assert report.kernels == native.kernels()
    assert report.packed_bytes + report.plan_bytes <= 3.0 * report.dense_bytes
    text = str(report)
    assert f"{len(report.converted)} of 4 layers are sparse" in text


def test_shared_weights_and_hooks_stay_dense():
    model = nn.Module()
    model.embed = nn.Embedding(20, 32)
    model.out = nn.Linear(32, 20, bias=False)
    model.out.weight = model.embed.weight
    model.hooked = nn.Linear(32, 32)
    model.hooked.register_forward_hook(lambda *_: None)
    model.attention = nn.MultiheadAttention(32, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::2] = 0
    reasons = {r.name: r.reason for r in compress_(model, measure=False).layers}
    assert reasons == {"out": "shares its weight with embed", "hooked": "it has hooks"}


def test_transposed_layers_of_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    sc.prune_(model, sc.Magnitude(), 0.6)
    fast = compress(model, measure=False)
    ids = torch.arange(10)[None]
    assert torch.allclose(fast(ids).logits, model(ids).logits, atol=1e-5)
    assert isinstance(fast.transformer.h[0].attn.c_attn, SparseLinear)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(fast.generate(ids, max_new_tokens=5, do_sample=False), plain)


def test_without_kernels_everything_stays_dense(net, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    report = compress_(net)
    assert {r.reason for r in report.layers} == {"no compiled kernels", "less than 30% zeros"}
    assert report.kernels == "torch"


def test_an_error_leaves_the_model_as_it_was(net):
    with torch.no_grad():
        net.second.weight[3, 5] = float("nan")
    before = list(net.children())
    with pytest.raises(SecateurError, match="NaN or infinite"):
        compress_(net, measure=False)
    assert all(a is b for a, b in zip(net.children(), before, strict=True))


def test_bad_settings(net):
    with pytest.raises(SecateurError, match=r"tokens=\.\.\. are whole numbers"):
        compress_(net, tokens=())
    with pytest.raises(SecateurError, match=r"memory=\.\.\. is a fraction"):
        compress_(net, memory=-1)
    with pytest.raises(SelectionError, match="no linear layer"):
        compress_(nn.ReLU())
    with pytest.raises(SecateurError, match=r"0 is on meta: move the model to the CPU"):
        compress_(nn.Sequential(nn.Linear(2, 2).to("meta")))


def test_the_table_is_whole_however_long_names_are():
    def layer(name, shape, reason, dense_bytes=163840):
        kind = (None, "float32") if reason else ("bitmask", "bfloat16")
        times = {} if reason.startswith("shares") else {1: 1.234, 64: 11.234}
        return LayerReport(name, shape, 0.5, *kind, dense_bytes, 100, 0, times, 0.0, reason)

    rows = (
        layer("model.layers.0.self_attn.q_proj", (64, 64), "dense is faster"),
        layer("lm_head", (512, 64), "shares its weight with model.embed_tokens"),
        layer("model.layers.0.mlp.gate_proj", (4096, 4096), "", 163_840_000),
    )
    lines = str(CompressReport(rows, "avx2", 1)).splitlines()
    table = [line for line in lines if line.startswith(("┃", "│"))]
    assert len(table) > 4
    assert all(line.rstrip().endswith(("┃", "│")) for line in table)
    assert max(map(len, lines)) <= 118
    assert any("4096 x 4096" in line and "1.23 at 1, 11.23 at 64" in line for line in table)
