"""Measurements have the form they say; the command works from a folder to numbers."""

import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import SecateurError
from secateur.runtime import advise, bench, bench_text, compress, native
from secateur.runtime.bench import Spread
from secateur.runtime.choose import compare

transformers = pytest.importorskip("transformers")


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    sc.prune_(model, sc.Magnitude(), 0.6)
    return model


def test_spread_is_median_and_quartiles():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == Spread(4.0, 2.5, 5.5, 7)
    assert Spread.of([1.0, 9.0]) == Spread(5.0, 3.0, 7.0, 2)  # never beyond what was measured


def test_a_forward_pass():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 2))
    sc.prune_(model, sc.Magnitude(), 0.6)
    fast = compress(model, measure=False)
    report = bench(model, fast, torch.randn(3, 32), runs=4)
    (row,) = report.rows
    assert row.dense.runs == row.sparse.runs == 4
    assert row.speedup == row.dense.median / row.sparse.median
    assert report.dense_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert "forward pass" in str(report)
    with pytest.raises(SecateurError, match=r"runs=\.\.\. is at least 1"):
        bench(model, fast, torch.randn(3, 32), runs=0)


def test_text(llama):
    fast = compress(llama, measure=False)
    report = bench_text(llama, fast, prompt=5, new=3, runs=2)
    prompt, each = report.rows
    assert (prompt.tokens, prompt.dense.runs) == (5, 2)
    assert (each.tokens, each.sparse.runs) == (1, 6)
    assert "tokens/s" in str(report)
    assert json.dumps(report.to_dict())
    with pytest.raises(SecateurError, match="writes no text"):
        bench_text(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(SecateurError, match="at least 1; got 0 and 3"):
        bench_text(llama, fast, prompt=0, new=3)


def test_plans_count_as_memory(llama, compiled):
    slim = bench_text(llama, compress(llama, measure=False), prompt=2, new=1, runs=1)
    fast = compress(llama, measure=False)
    for module in fast.modules():
        if isinstance(module, sc.runtime.SparseLinear):
            module.set_plan(sc.runtime.Plan.of(module.packed))
    more = bench_text(llama, fast, prompt=2, new=1, runs=1)
    assert more.sparse_bytes > slim.sparse_bytes


def test_times_are_of_calls_in_turn():
    calls = []

    class Noted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    first, second = Noted(4, 4), Noted(4, 4)
    times = compare(first, second, torch.ones(1, 4), seconds=0)
    assert times.dense > 0
    assert times.sparse > 0
    assert len({id(c) for c in calls}) > 2  # copies, so that weights come from memory
    ours = [c for c in calls if c in (first, second)]
    assert all(a is first and b is second for a, b in zip(ours[::2], ours[1::2], strict=True))


def test_advice(compiled):
    choice = advise(96, 128, 0.7, tokens=(1, 20))
    assert choice.format in ("bitmask", "indexed")
    assert set(choice.times) == {1, 20}
    assert advise(96, 128, 0.7, stored=torch.int8).dtype == torch.int8
    with pytest.raises(SecateurError, match="is no layer"):
        advise(96, 128, 1.7)
    with pytest.raises(SecateurError, match="whole numbers"):
        advise(96, 128, 0.7, tokens=(0,))


def test_no_advice_without_kernels(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert advise(4, 4, 0.5) is None
