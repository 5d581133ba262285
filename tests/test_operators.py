"""Where the time of a forward pass goes, and why a smaller model is not faster by more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.measure import Latency, Measurement
from secateur.operators import OperatorTime, operator_times, vector_width, why_not_faster

LANES = vector_width(torch.zeros(1))


class Net(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(LANES, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, LANES, 3, padding=1)
        self.inner = nn.Linear(LANES, hidden)
        self.outer = nn.Linear(hidden, LANES)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h = self.second(F.relu(self.first(x_NCHW))).mean((2, 3))
        h = self.outer(F.relu(self.inner(h)))
        return h @ h.T


def _found(model: nn.Module) -> dict[str, OperatorTime]:
    return {t.name: t for t in operator_times(model, torch.randn(2, LANES, 8, 8), runs=2)}


def test_every_call_is_counted_and_products_are_told_from_the_rest() -> None:
    found = _found(Net(LANES, LANES))
    assert {n: t.calls for n, t in found.items() if t.products} == {"convolution": 2, "addmm": 2, "mm": 1}
    assert found["relu"].calls == 2 and not found["relu"].products
    assert all(t.seconds > 0 for t in found.values() if t.products)
    assert sum(t.uneven for t in found.values()) == 0


def test_uneven_are_outputs_of_convolutions_and_both_sizes_of_other_weights() -> None:
    found = _found(Net(LANES + 1, 2 * LANES - 1))
    # The second convolution has uneven inputs only, and the product of activations has no weight.
    assert {n: t.uneven for n, t in found.items() if t.products} == {"convolution": 1, "addmm": 2, "mm": 0}


def test_the_channels_of_all_groups_of_a_convolution_count_as_one() -> None:
    model = nn.Conv2d(2 * LANES, 2 * LANES, 3, groups=LANES // 2)
    (time,) = (t for t in operator_times(model, torch.randn(1, 2 * LANES, 4, 4), runs=1) if t.products)
    assert time.uneven == 0


@pytest.mark.parametrize("layer", [nn.LSTM(4, 5), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
def test_kernels_that_hold_products_are_products(layer: nn.Module) -> None:
    layer.eval()
    found = operator_times(layer, torch.randn(3, 2, next(layer.parameters()).shape[1]), runs=1)
    assert any(t.products for t in found)


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    operator_times(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def _cost(seconds: float, macs: int) -> Measurement:
    return Measurement(1, 1, 4, 4, macs, macs, Latency(seconds, seconds, seconds, 10, 1))


def _times(convolution: float, linear: float, other: float, uneven: tuple[int, int]) -> list[OperatorTime]:
    return [
        OperatorTime("convolution", 10, convolution, True, uneven[0]),
        OperatorTime("addmm", 5, linear, True, uneven[1]),
        OperatorTime("native_batch_norm", 10, other, False, 0),
    ]


def test_the_sentence_splits_the_dense_time_into_what_fell_and_what_did_not() -> None:
    text = why_not_faster(
        _cost(1.0, 100),
        _cost(0.8, 50),
        _times(0.5, 0.1, 0.3, (1, 1)),
        _times(0.35, 0.07, 0.27, (9, 1)),
        16,
    )
    assert text == (
        "The time fell by 20% where the multiply-accumulates fell by 50%. Of the dense time, 60% in products "
        "of matrices, convolutions among them, and there it fell by 30%; 30% in other operators, which wait "
        "for memory, and there it fell by 10%; 10% in Python and the dispatcher, between operators, and "
        "there it rose by 10%. 10 of 15 products (before: 2) have a size that is no multiple of 16, the "
        "vector width here: convolutions do the work of the next multiple. multiple_of=16 aligns them."
    )


def test_alignment_is_blamed_only_where_it_got_worse_and_on_whom_it_is() -> None:
    dense = _times(0.3, 0.3, 0.4, (2, 3))
    same = why_not_faster(_cost(1.0, 100), _cost(0.9, 50), dense, _times(0.25, 0.25, 0.4, (2, 3)), 8)
    assert same is not None and "multiple" not in same.replace("multiply", "")
    linear = why_not_faster(_cost(1.0, 100), _cost(0.9, 50), dense, _times(0.25, 0.25, 0.4, (0, 6)), 8)
    assert linear is not None and "slower remainder" in linear and "convolutions do" not in linear


@pytest.mark.parametrize(
    ("seconds", "macs"),
    [
        (0.6, 50),  # 80 % of what the work fell by
        (0.5, 50),
        (1.0, 99),  # too little to tell from noise
        (1.1, 100),
        (1.0, 120),
    ],
)
def test_nothing_is_said_where_time_followed(seconds: float, macs: int) -> None:
    times = _times(0.5, 0.2, 0.3, (0, 0))
    assert why_not_faster(_cost(1.0, 100), _cost(seconds, macs), times, times, 16) is None


def test_disturbed_timing_is_called_so() -> None:
    dense, smaller = _times(0.5, 0.2, 0.3, (0, 0)), _times(0.25, 0.1, 0.15, (0, 0))
    text = why_not_faster(_cost(1.0, 100), _cost(1.0, 50), dense, smaller, 16)
    assert text == (
        "The time fell by 0% where the multiply-accumulates fell by 50%. Inside operators it fell by 50%: "
        "other work on this machine disturbed the timing. Measure again when it is quiet."
    )


def test_the_report_of_a_shrunk_model_holds_both_models_operators() -> None:
    model = Net(2 * LANES, LANES)
    report = sc.shrink_(
        model, torch.randn(2, LANES, 8, 8), sc.Budget.macs(0.6), kinds="filters", criterion=sc.Random(0)
    )
    calls = [{t.name: t.calls for t in ts} for ts in (report.operators_before, report.operators_after)]
    assert calls[0] == calls[1] and calls[0]["convolution"] == 2
    data = report.to_dict()
    assert data["operators"]["after"][0].keys() == {"name", "calls", "seconds", "products", "uneven"}
    assert data["why_not_faster"] == report.why_not_faster
    if report.why_not_faster is not None:
        assert report.why_not_faster[:20] in str(report)
