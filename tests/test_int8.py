"""Quantisation after pruning: exact grids, zeros in place, errors made up for, in the right order."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.core.errors import MaskError, NonFiniteError, SecateurError
from secateur.int8 import Quantized, quantized, scales_of
from secateur.int8.grid import Grid
from secateur.solvers import Quadratic

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(outputs: int, inputs: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Quadratic]:
    """A weight and the objective of correlated inputs, of scales whose logarithms have this deviation."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    scales = (spread * torch.randn(inputs, generator=draw)).exp()
    x = torch.randn(600, inputs, generator=draw) @ mix * scales
    return torch.randn(outputs, inputs, generator=draw), Quadratic(x.T @ x / len(x))


def nearest(weight: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each weight to the nearest point of a grid with one scale a row, written out."""
    scale = Grid(bits).scale(weight.abs().amax(1, keepdim=True), dtype)
    return (weight / scale).round() * scale


def levels_of(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Integers, after a check that they reproduce the weights exactly in float32 and in the stored type."""
    scales = scales_of(weight, bits, group).repeat_interleave(group or weight.shape[1], dim=1)
    levels = (weight.float() / scales).round()
    assert torch.equal(levels * scales, weight.float())
    assert torch.equal(levels.to(weight.dtype) * scales.to(weight.dtype), weight)
    assert levels.abs().max() <= 2 ** (bits - 1) - 1
    return levels


# ------ grids


@st.composite
def cases(draw):
    """Weights of any scale with a mask, and a grid."""
    groups, group = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    shape = (draw(st.integers(1, 5)), groups * group)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.integers(-18, 4) if dtype == torch.float16 else st.integers(-60, 60))
    weight = (torch.randn(shape, generator=generator) * 2.0**scale).to(dtype)
    keep = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    rows = torch.randn(20, shape[1], generator=generator)
    bits = draw(st.integers(2, 8))
    return weight, keep, Quadratic(rows.T @ rows), bits, draw(st.sampled_from([None, group])), dtype


@given(cases())
@settings(max_examples=150)
def test_zeros_and_grid_are_exact(case: Any) -> None:
    weight, keep, objective, bits, group, dtype = case
    before = weight.clone(), keep.clone()
    Q = quantized(weight, keep, objective, bits, group, dtype)
    assert torch.equal(weight, before[0]) and torch.equal(keep, before[1])
    assert Q.dtype == torch.float32 and not Q[~keep].any()
    stored = Q.to(dtype)
    assert torch.equal(stored.float(), Q)
    levels = levels_of(stored, bits, group)
    for part in levels.int().unflatten(1, (-1, group or levels.shape[1])).flatten(0, 1):
        assert math.gcd(*part.tolist()) in (0, 1)  # no larger scale would do
    # What is found on the grid once is found again.
    assert torch.equal(scales_of(Q, bits, group), scales_of(stored, bits, group))


@given(st.integers(2, 8), st.data())
def test_the_scale_is_found_again(bits: int, data: Any) -> None:
    top = 2 ** (bits - 1) - 1
    levels = data.draw(st.lists(st.integers(-top, top), min_size=1, max_size=12))
    scale = data.draw(st.integers(1, 2 ** (24 - bits))) * 2.0 ** data.draw(st.integers(-80, 60))
    found = scales_of(torch.tensor([levels]) * torch.tensor(scale, dtype=torch.float32), bits)
    assert found.item() == (scale * math.gcd(*levels) if any(levels) else 1.0)


@pytest.mark.parametrize(
    ("dtype", "bits", "free"),
    [
        (torch.float32, 8, 17),
        (torch.float16, 8, 4),
        (torch.bfloat16, 8, 1),
        (torch.bfloat16, 4, 5),
        (torch.float32, 2, 23),
    ],
)
def test_scales_are_the_smallest_with_their_bits(dtype: torch.dtype, bits: int, free: int) -> None:
    largest = torch.randn(500).abs() + 1e-3
    scale = Grid(bits).scale(largest, dtype)
    mantissa, exponent = torch.frexp(scale)
    assert torch.equal(mantissa * 2**free, (mantissa * 2**free).round())
    top = 2 ** (bits - 1) - 1
    assert (scale.double() * top >= largest * (1 - 1e-7)).all()
    below = torch.ldexp((mantissa * 2**free - 1).double(), exponent - free)
    assert (below * top < largest).all()


def test_weights_that_are_on_no_such_grid_are_refused() -> None:
    W, objective = problem(6, 16)
    keep = torch.rand(W.shape) < 0.5
    Q = quantized(W, keep, objective, 8)
    scales_of(Q, 8)
    for other, bits, group in (
        (W, 8, None),
        (Q, 7, None),
        (Q * (1 + 1e-6), 8, None),
        (Q.bfloat16(), 8, None),
    ):
        with pytest.raises(SecateurError, match=f"on no grid of {bits} bits with one scale for each row"):
            scales_of(other, bits, group)
    by_group = quantized(W, keep, objective, 4, 4)
    with pytest.raises(SecateurError, match="one scale for each 8 inputs"):
        scales_of(by_group, 4, 8)
    with pytest.raises(SecateurError, match="on no grid"):
        scales_of(Q.double() * (1 + 1e-12), 8)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    W, objective = problem(4, 12)
    keep = torch.ones_like(W, dtype=torch.bool)
    for bits in (1, 9):
        with pytest.raises(SecateurError, match=f"from 2 to 8; got {bits}"):
            Quantized(sc.SparseGPT(), bits)
        with pytest.raises(SecateurError, match=f"from 2 to 8; got {bits}"):
            quantized(W, keep, objective, bits)
    with pytest.raises(SecateurError, match="at least 1, or None"):
        Quantized(sc.SparseGPT(), group=0)
    with pytest.raises(SecateurError, match="group=5 does not divide the 12 inputs"):
        quantized(W, keep, objective, group=5)
    with pytest.raises(MaskError, match="do not fit together"):
        quantized(W[:, :8], keep[:, :8], objective)
    with pytest.raises(NonFiniteError):
        quantized(W.masked_fill(W > 1, torch.nan), keep, objective)
    with pytest.raises(SecateurError, match=r"floating-point type, that of the model; got torch\.int8"):
        quantized(W, keep, objective, dtype=torch.int8)


# ------ the sweep


def _sweep(W: Tensor, keep: Tensor, H: Tensor, scale: Tensor, top: int) -> Tensor:
    """As the papers derive it: column by column, the inverse of what is left of H anew each time, float64."""
    W, H = W.double().clone(), H.double()
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        q = ((W[:, j] / scale).round().clamp(-top, top) * scale) * keep[:, j]
        W[:, j + 1 :] -= torch.outer((W[:, j] - q) / inverse[0, 0], inverse[0, 1:])
        W[:, j] = q
    return W


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("inputs", [5, 64, 150])
def test_the_sweep_is_that_of_the_papers(inputs: int, bits: int) -> None:
    W, objective = problem(12, inputs)
    pruned = sc.SparseGPT()(W, objective, sc.Unstructured(), 0.5)
    Q = quantized(pruned.weight, pruned.keep, objective, bits)
    top = 2 ** (bits - 1) - 1
    scale = Grid(bits).scale(pruned.weight.abs().amax(1), torch.float32).double()
    expected = _sweep(pruned.weight, pruned.keep, objective.H_II, scale, top)
    # A value halfway between two points may go either way, and what follows from it.
    same = torch.isclose(Q.double(), expected, rtol=0, atol=1e-6)
    assert same.double().mean() > 0.97
    assert objective.error(Q, W) == pytest.approx(objective.error(expected.float(), W), rel=0.02)


def test_scales_of_groups_are_those_of_what_the_sweep_finds_there() -> None:
    W, objective = problem(5, 12)
    keep = torch.rand(W.shape) < 0.7
    Q = quantized(W, keep, objective, 4, 4)
    left, H = W.double().clone(), objective.H_II.double()
    for start in (0, 4, 8):
        largest = (left[:, start : start + 4] * keep[:, start : start + 4]).abs().amax(1).float()
        scale = Grid(4).scale(largest, torch.float32).double()
        for j in range(start, start + 4):
            inverse = torch.linalg.inv(H[j:, j:])
            q = (left[:, j] / scale).round().clamp(-7, 7) * scale * keep[:, j]
            torch.testing.assert_close(Q[:, j].double(), q, rtol=1e-4, atol=1e-6)
            left[:, j + 1 :] -= torch.outer((left[:, j] - q) / inverse[0, 0], inverse[0, 1:])


def test_from_dense_weights_the_sweep_makes_up_for_the_removal_too() -> None:
    W, objective = problem(8, 48)
    W[:, 0] = 5  # the largest of each row, kept, and never updated: one scale for both ways
    pruned = sc.SparseGPT()(W, objective, sc.Unstructured(), 0.5)
    assert pruned.keep[:, 0].all()
    jointly = quantized(W, pruned.keep, objective, 5)
    after = quantized(pruned.weight, pruned.keep, objective, 5)
    assert torch.isclose(jointly, after).float().mean() > 0.97


def test_brute_force_over_all_points_of_a_tiny_grid() -> None:
    draw = torch.Generator().manual_seed(1)
    rows, top = 30, 3
    x = torch.randn(200, 4, generator=draw) @ torch.randn(4, 4, generator=draw)
    W, objective = torch.randn(rows, 4, generator=draw), Quadratic(x.T @ x / 200)
    keep = torch.ones(rows, 4, dtype=torch.bool)
    keep[::2, 1] = False
    H = objective.H_II.double()
    scale = Grid(3).scale((W * keep).abs().amax(1, keepdim=True), torch.float32)
    points = torch.tensor(list(itertools.product(range(-top, top + 1), repeat=4))).float()

    def errors(Q: Tensor) -> Tensor:
        D = (Q - W[:, None] if Q.dim() == 3 else Q - W).double()
        return ((D @ H) * D).sum(-1)

    every = points * scale[:, None]  # [rows, points, 4]
    allowed = ((points == 0)[None] | keep[:, None]).all(-1)
    best = errors(every).masked_fill(~allowed, torch.inf).amin(1)
    Q = quantized(W, keep, objective, 3)
    ours, plain = errors(Q), errors((W / scale).round() * scale * keep)
    assert (ours >= best * (1 - 1e-4)).all()
    assert (ours.sum() - best.sum()) < 0.5 * (plain.sum() - best.sum())
    # The last weight is the best one, given all before it.
    last = torch.stack([torch.cat([Q[:, :3], q * scale], 1) for q in range(-top, top + 1)], 1)
    assert (ours <= errors(last).amin(1) * (1 + 1e-4)).all()


def test_inputs_without_correlation_are_rounded_to_the_nearest() -> None:
    W, _ = problem(6, 40)
    keep = torch.rand(W.shape) < 0.5
    objective = Quadratic(torch.diag(torch.rand(40) + 0.1))
    assert torch.equal(quantized(W * keep, keep, objective, 4), nearest(W * keep, 4))


@pytest.mark.parametrize("solver", [sc.SparseGPT(), sc.ALPS(), sc.Select(sc.Wanda())], ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), [(sc.Unstructured(), 0.5), (sc.NM(2, 4), 0.5)], ids=str)
def test_making_up_for_rounding_beats_rounding(solver: Any, pattern: Any, sparsity: float) -> None:
    W, objective = problem(64, 128)
    pruned = solver(W, objective, pattern, sparsity)
    for bits, at_most in ((3, 0.85), (4, 0.85), (8, 1.0)):
        plain = nearest(pruned.weight, bits)
        ours = quantized(pruned.weight, pruned.keep, objective, bits)
        assert objective.error(ours, pruned.weight) < at_most * objective.error(plain, pruned.weight)
        # And of all that is lost, beside the dense layer.
        assert objective.error(ours, W) < objective.error(plain, W) * (1.001 if bits == 8 else 1)


@given(st.integers(0, 1000), st.integers(1, 40))
@settings(max_examples=30)
def test_at_eight_bits_never_worse_than_rounding_by_more_than_noise(seed: int, inputs: int) -> None:
    W, objective = problem(4, inputs, seed)
    keep = torch.ones_like(W, dtype=torch.bool)
    plain, ours = nearest(W, 8), quantized(W, keep, objective, 8)
    assert objective.error(ours, W) < objective.error(plain, W) + 1e-4


# ------ in the right order


def _beats_the_wrong_order(W: Tensor, objective: Quadratic, bits: int, sparsity: float) -> None:
    right = Quantized(sc.SparseGPT(), bits)(W, objective, sc.Unstructured(), sparsity)
    levels_of(right.weight, bits)
    assert int((~right.keep).sum()) == round(sparsity * W.numel()) and not right.weight[~right.keep].any()
    assert right.error == pytest.approx(objective.error(right.weight, W))
    # Quantised as well as can be, then pruned: either without an update, so that what stays is on the grid,
    # or with one, after which it has to be rounded a second time.
    first = quantized(W, torch.ones_like(W, dtype=torch.bool), objective, bits)
    cut = sc.Select(sc.Wanda(), steps=0)(first, objective, sc.Unstructured(), sparsity).weight
    updated = sc.SparseGPT()(first, objective, sc.Unstructured(), sparsity)
    again = quantized(updated.weight, updated.keep, objective, bits)
    for wrong in (cut, nearest(updated.weight, bits), again):
        assert right.error < 0.98 * objective.error(wrong, W)


@pytest.mark.parametrize("spread", [0, 0.5])
def test_prune_then_quantise_beats_quantise_then_prune(spread: float) -> None:
    _beats_the_wrong_order(*problem(64, 128, spread=spread), 4, 0.5)


@pytest.mark.realdata("stories260k", "tinystories")
def test_the_order_matters_in_a_trained_model(data_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(data_root / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(data_root / "stories260k")
    heard: dict[str, list[Tensor]] = {"self_attn.q_proj": [], "mlp.up_proj": [], "mlp.down_proj": []}
    block = model.model.layers[2]
    for name, rows in heard.items():
        hear = lambda m, args, rows=rows: rows.append(args[0].detach().flatten(0, -2))  # noqa: E731
        block.get_submodule(name).register_forward_pre_hook(hear)
    for story in json.loads((data_root / "tinystories" / "stories.json").read_text())[:20]:
        with torch.no_grad():
            model(tokenizer(story, return_tensors="pt")["input_ids"][:, :512])
    for name, rows in heard.items():
        x = torch.cat(rows)
        for bits, sparsity in ((3, 0.5), (4, 0.5), (4, 0.7)):
            weight = block.get_submodule(name).weight.detach()
            _beats_the_wrong_order(weight, Quadratic(x.T @ x / len(x)), bits, sparsity)


def test_the_scale_is_that_of_the_survivors() -> None:
    W, objective = problem(4, 16)
    keep = torch.ones_like(W, dtype=torch.bool)
    W[:, 3], keep[:, 3] = 100.0, False
    Q = quantized(W * keep, keep, objective, 8)
    assert scales_of(Q, 8).max() < 5 / 127
    by_group = quantized(W, keep, objective, 8, 4)  # updates and removed weights lie in the group
    assert (by_group[:, 3] == 0).all() and by_group[:, :3].any()
    largest = (W * keep)[:, :4].abs().amax(1)
    assert (scales_of(by_group, 8, 4)[:, 0] < largest).all()


# ------ whole models


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model_and_data(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(16), Block(16), nn.Linear(16, 5)).to(dtype)
    mix = torch.randn(16, 16)
    return model, [(torch.randn(8, 12, 16) @ mix).to(dtype) for _ in range(4)]


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_prune_and_quantise_in_one_pass(dtype: torch.dtype, bits: int, group: int | None) -> None:
    model, data = model_and_data(dtype)
    report = sc.prune_(model, Quantized(sc.SparseGPT(), bits, group), 0.5, batches=data)
    assert report.removed == report.entries // 2
    report.masks.check(model)
    for layer in report.layers:
        levels_of(model.get_parameter(layer.name).detach(), bits, group)
    assert f"bits={bits}" in report.settings["criterion"]
    with pytest.raises(SecateurError, match="on no grid"):
        scales_of(model[2].weight.detach())  # the head is left alone


def test_each_layer_is_fitted_to_what_quantised_ones_pass_on() -> None:
    model, data = model_and_data()
    dense = copy.deepcopy(model)
    report = sc.prune_(model, Quantized(sc.SparseGPT(), 3), 0.5, batches=data)
    heard: list[Tensor] = []
    model[1].down.register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for x in data:
            model(x)
        rows = torch.cat(heard)
        lost, whole = rows @ (model[1].down.weight - dense[1].down.weight).T, rows @ dense[1].down.weight.T
    error = next(layer.error for layer in report.layers if layer.name == "1.down.weight")
    assert error == pytest.approx(float(lost.square().sum() / whole.square().sum()), rel=1e-3)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantising_a_pruned_model_keeps_its_masks(dtype: torch.dtype, with_data: bool) -> None:
    model, data = model_and_data(dtype)
    masks = sc.prune_(model, sc.SparseGPT(), 0.5, batches=data).masks
    pruned = copy.deepcopy(model)
    done = sc.quantize_(model, masks, bits=5, group=8, batches=data if with_data else None)
    masks.check(model)
    assert done.scales.keys() == done.errors.keys() == masks.keys()
    for name, scales in done.scales.items():
        weight, before = model.get_parameter(name).detach(), pruned.get_parameter(name).detach()
        levels_of(weight, 5, 8)
        assert torch.equal(scales, scales_of(weight, 5, 8)) and 0 < done.errors[name] < 0.01
        if not with_data:
            lost, whole = (weight.float() - before.float()).square().sum(), before.float().square().sum()
            assert done.errors[name] == pytest.approx(float(lost / whole), rel=1e-4)
    others = model.state_dict().keys() - masks.keys()
    assert all(torch.equal(model.state_dict()[n], pruned.state_dict()[n]) for n in others)


def test_data_makes_a_better_model_of_few_bits() -> None:
    model, data = model_and_data()
    sc.prune_(model, sc.SparseGPT(), 0.5, batches=data)
    x = torch.cat(data)
    errors = []
    for batches in (None, data):
        twin = copy.deepcopy(model)
        sc.quantize_(twin, bits=3, batches=batches)
        with torch.no_grad():
            errors.append(float((twin(x) - model(x)).square().sum()))
    assert errors[1] < 0.8 * errors[0]


def test_convolutions_and_transposed_weights() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), Conv1D(8, 6 * 16), nn.Linear(8, 3))
    data = [torch.randn(5, 4, 6, 6) for _ in range(6)]
    masks = sc.prune_(model, sc.Magnitude(), 0.5).masks
    for batches in (None, data):
        twin = copy.deepcopy(model)
        done = sc.quantize_(twin, masks, bits=4, group=4, batches=batches)
        masks.check(twin)
        for target in sc.select(twin).targets:
            levels_of(target.matrix, 4, 4)
            assert done.scales[target.name].shape == (target.shape[0], target.shape[1] // 4)


def test_errors_leave_the_model_as_it_was() -> None:
    model, data = model_and_data()
    masks = sc.prune_(copy.deepcopy(model), sc.Magnitude(), 0.5).masks
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError, match="are not zero though its mask removes them"):
        sc.quantize_(model, masks)  # never applied: pruning comes first
    with pytest.raises(SecateurError, match=r"group=32 does not divide the 16 inputs of 0\.up\.weight"):
        sc.quantize_(model, group=32)
    with pytest.raises(SecateurError, match="does not divide"):
        sc.prune_(model, Quantized(sc.SparseGPT(), group=32), 0.5, batches=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[1].down.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1\.down\.weight"):
        sc.quantize_(model)
    assert torch.equal(model[0].up.weight, before["0.up.weight"])


@given(st.integers(2, 8), st.sampled_from([None, 4]), st.integers(0, 100))
@settings(max_examples=20)
def test_quantising_twice_changes_nothing(bits: int, group: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 2))
    sc.prune_(model, sc.Magnitude(), 0.5)
    first = sc.quantize_(model, bits=bits, group=group)
    once = model[0].weight.detach().clone()
    second = sc.quantize_(model, bits=bits, group=group)
    assert torch.equal(model[0].weight, once) and second.errors == {"0.weight": 0.0}
    assert torch.equal(first.scales["0.weight"], second.scales["0.weight"])
