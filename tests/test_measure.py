"""Costs of models against counts by hand."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.measure import packed_size, zeros
from tests.reference import Attention, Recurrent, Tied, llama


def macs(model: nn.Module, example: object) -> tuple[int, int]:
    found = sc.measure(model, example, runs=1)
    assert found.macs is not None and found.effective_macs is not None
    return found.macs, found.effective_macs


@torch.no_grad()
def sparsify(weight: Tensor, keep: int) -> None:
    """Leaves `keep` entries."""
    weight.fill_(1)
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() - keep]] = 0


def test_parameters_nonzeros_and_bytes():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False).bfloat16())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
    sparsify(model[0].weight, 3)
    sparsify(model[2].weight, 11)
    found = sc.measure(model)
    assert found.parameters == 20 + 4 + 4 + 4 + 12
    assert found.nonzero == 3 + 4 + 4 + 4 + 11
    assert found.sparsity == pytest.approx(1 - 26 / 44)
    buffers = 4 * 4 + 4 * 4 + 8  # running mean, running variance, an int64 counter
    assert found.dense_bytes == 4 * 32 + 2 * 12 + buffers
    # A bit a weight and the values that are not zero; dense where that is no more: all but the first.
    assert found.packed_bytes == (3 + 4 * 3) + 3 * 16 + min(24, 2 + 2 * 11) + buffers
    assert (found.macs, found.effective_macs, found.latency) == (None, None, None)


def test_tied_weights_and_shared_buffers_count_once():
    model = Tied()
    model.register_buffer("a", torch.zeros(10))
    model.head.register_buffer("b", model.a)
    found = sc.measure(model)
    assert found.parameters == 25 + 5 + 5 + 15 + 3
    assert found.dense_bytes == 4 * (found.parameters + 10)


def test_a_model_without_parameters():
    found = sc.measure(nn.ReLU(), torch.randn(2, 3), runs=1)
    assert (found.parameters, found.nonzero, found.sparsity, found.macs) == (0, 0, 0.0, 0)


@pytest.mark.parametrize(
    ("entries", "nonzero", "itemsize", "expected"),
    [
        (16, 0, 4, 2),
        (17, 0, 4, 3),
        (16, 5, 4, 22),
        (16, 16, 4, 64),
        (32, 31, 4, 128),
        (1, 0, 2, 1),
        (0, 0, 4, 0),
    ],
)
def test_packed_size_is_a_bit_a_weight_and_the_values_or_dense(entries, nonzero, itemsize, expected):
    assert packed_size(entries, nonzero, itemsize) == expected


def test_zeros_are_exact_zeros():
    assert zeros(torch.tensor([[0.0, -0.0, 1e-45], [float("nan"), 2.0, -1.0]])) == 2


LAYERS = [
    (nn.Linear(5, 4), (3, 5), 3 * 20),
    (nn.Linear(5, 4, bias=False), (3, 7, 5), 21 * 20),
    (nn.Linear(5, 4), (5,), 20),
    (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), 2 * 4 * (6 * 4 * 3)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 2 * 35 * (6 * 4 * 9)),
    (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 7), 15 * (6 * 2 * 9)),
    (nn.Conv2d(4, 8, (3, 2), dilation=2, groups=4), (1, 4, 5, 7), 1 * 5 * (8 * 1 * 6)),
    (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * (3 * 2 * 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 2 * 25 * (4 * 3 * 9)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS, ids=[str(layer) for layer, *_ in LAYERS])
def test_multiply_accumulates_of_one_layer(layer, shape, expected):
    x, entries = torch.randn(shape), layer.weight.numel()
    assert macs(layer, x) == (expected, expected)
    for keep in (entries - 1, entries // 3, 0):
        sparsify(layer.weight, keep)
        assert macs(layer, x) == (expected, expected * keep // entries)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_multiply_accumulates_of_recurrent_layers(kind, gates):
    layer, x = kind(5, 4, batch_first=True), torch.randn(3, 7, 5)
    inner, outer = 21 * gates * 4 * 5, 21 * gates * 4 * 4
    assert macs(layer, x) == (inner + outer, inner + outer)
    sparsify(layer.weight_hh_l0, gates * 4)  # a quarter
    assert macs(layer, x) == (inner + outer, inner + outer // 4)


@pytest.mark.parametrize("fused", [True, False])
def test_multiply_accumulates_of_attention(fused):
    batch, tokens, width = 2, 5, 6
    model, x = nn.MultiheadAttention(width, 2, batch_first=True), torch.randn(batch, tokens, width)
    example = {"query": x, "key": x, "value": x, "need_weights": not fused}
    project_in, project_out = batch * tokens * 3 * width**2, batch * tokens * width**2
    products = 2 * batch * tokens**2 * width  # of queries with keys, and with values
    total = project_in + project_out + products
    assert macs(model, example) == (total, total)
    with torch.no_grad():
        model.in_proj_weight[:width] = 0  # the queries' third
    assert macs(model, example) == (total, total - project_in // 3)
    with torch.no_grad():
        model.out_proj.weight[0] = 0
    assert macs(model, example) == (total, total - project_in // 3 - project_out // 6)


@pytest.mark.parametrize("training", [True, False])
def test_multiply_accumulates_of_a_transformer_layer(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training)
    dense = 2 * 5 * (4 * 64 + 2 * 128)
    assert macs(layer, torch.randn(2, 5, 8)) == (dense + 2 * 2 * 25 * 8,) * 2


def test_multiply_accumulates_of_a_language_model():
    model, ids = llama(), torch.randint(0, 50, (3, 7))
    attention, feed_forward = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24
    per_token = 2 * (attention + feed_forward) + 16 * 50
    products = 2 * 3 * 2 * 7**2 * 16
    total = 3 * 7 * per_token + products
    # Angles of the rotary embedding: a product of matrices in some versions of transformers.
    rotary = macs(model, {"input_ids": ids})[0] - total
    assert rotary in (0, 3 * 7 * 2)
    sparsify(model.model.layers[1].mlp.down_proj.weight, 0)
    assert macs(model, {"input_ids": ids}) == (total + rotary, total + rotary - 21 * 16 * 24)


def test_shared_weights_used_twice_and_by_bare_functions_count_each_use():
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(self.layer(x)), self.layer.weight[:2]) @ x[:2, :2].T

    model, x = Uses(), torch.randn(3, 4)
    uses = 3 * 16 + 3 * 16 + 3 * 8
    assert macs(model, x) == (uses + 3 * 2 * 2,) * 2
    with torch.no_grad():
        model.layer.weight[0] = 0
    assert macs(model, x) == (uses + 12, uses + 12 - 3 * (4 + 4 + 4))


def test_products_between_activations_do_not_become_sparse():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ x.T

    model, x = Product(), torch.randn(3, 4)
    nn.init.zeros_(model.layer.weight)
    assert macs(model, x) == (3 * 16 + 9 * 4, 9 * 4)


def test_inference_mode_counts_alike():
    model, x = Attention(), torch.randn(2, 4, 6)
    outside = macs(model, x)
    with torch.inference_mode():
        assert macs(model, torch.randn(2, 4, 6)) == outside
        assert macs(Recurrent(), torch.randn(2, 4, 5)) == macs(Recurrent(), torch.randn(2, 4, 5).clone())


def test_examples_are_tensors_tuples_or_mappings():
    model, a, b = nn.Bilinear(3, 4, 5), torch.randn(2, 3), torch.randn(2, 4)
    assert sc.measure(model, (a, b), runs=1).latency is not None
    assert sc.measure(model, {"input1": a, "input2": b}, runs=1).latency is not None
    assert macs(nn.Linear(3, 2), a) == macs(nn.Linear(3, 2), {"input": a}) == (12, 12)


@pytest.mark.parametrize("fail", [False, True])
def test_every_module_keeps_its_own_mode(fail):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.dropout = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            assert not self.dropout.training
            out = self.dropout(self.norm(self.a(x)))
            if fail:
                raise RuntimeError("failed")
            return out

    model = Model().train()
    model.norm.eval()  # frozen, as when fine-tuning
    before = {name: t.clone() for name, t in model.state_dict().items()}
    if fail:
        with pytest.raises(RuntimeError, match="failed"):
            sc.measure(model, torch.randn(4, 3))
    else:
        sc.measure(model, torch.randn(4, 3), runs=1)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_latency_is_of_the_passes_that_were_timed(runs):
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            if Counting.calls == 3 + runs:
                time.sleep(0.02)  # an outlier must not push a quartile of two passes below 0
            return x

    start = time.perf_counter()
    found = sc.measure(Counting(), torch.randn(2), runs=runs).latency
    elapsed = time.perf_counter() - start
    assert found is not None
    assert Counting.calls == 1 + 2 + runs  # one to count operations, two to warm up
    assert 0 < found.low <= found.median <= found.high <= elapsed
    assert (found.runs, found.threads) == (runs, torch.get_num_threads())


def test_no_runs_are_refused():
    with pytest.raises(sc.SecateurError, match="at least 1; got 0"):
        sc.measure(nn.Linear(2, 2), torch.randn(1, 2), runs=0)


def test_a_measurement_is_plain_data():
    found = sc.measure(nn.Linear(3, 2), torch.randn(1, 3), runs=3).to_dict()
    assert found["macs"] == 6 and found["parameters"] == 8
    assert set(found["latency"]) == {"median", "low", "high", "runs", "threads"}
    assert math.isfinite(found["latency"]["median"])
