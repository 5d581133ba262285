"""One layer: least squares against explicit rows, and errors against measured ones."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import MaskError, NonFiniteError, SecateurError
from secateur.core.layout import Convolution, Plain, Transposed
from secateur.reconstruct import CrossMoments, Moments, reconstruct
from secateur.reconstruct.moments import Joint, Splitting


def rows(generator: torch.Generator, n: int = 200, inputs: int = 6) -> Tensor:
    """Dependent inputs whose means are not zero."""
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(n, inputs, generator=generator, dtype=torch.float64) @ mix + 2.0


def problem(generator: torch.Generator, out: int = 4, inputs: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(out, generator=generator, dtype=torch.float64)
    keep = torch.ones(inputs, dtype=torch.bool)
    keep[[1, 4]] = False
    return weight, bias, keep


def measured(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | float, new: Tensor, constant: Tensor | float
):
    y = x @ weight.T + bias
    return float((y - z @ new.T - constant).square().sum() / y.square().sum())


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_solution_is_that_of_least_squares(generator, with_bias, changed):
    x = rows(generator)
    z = x + 0.3 * rows(generator) if changed else x
    weight, bias, keep = problem(generator)
    y = x @ weight.T + (bias if with_bias else 0)
    design = z[:, keep]
    if with_bias:
        design = torch.cat([design, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    expected = torch.linalg.lstsq(design, y).solution.T
    moments = CrossMoments.of(x, z) if changed else Moments.of(x)
    found = reconstruct(weight, bias if with_bias else None, keep, moments, Plain(), damping=0.0)
    torch.testing.assert_close(found.weight[:, keep], expected[:, : int(keep.sum())])
    assert not found.weight[:, ~keep].any() and found.damping == 0.0
    if with_bias:
        torch.testing.assert_close(found.bias, expected[:, -1])
    else:
        assert found.bias is None and any("no bias" in note for note in found.notes)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_errors_are_those_of_explicit_rows(generator, with_bias, changed):
    x = rows(generator)
    z = x + 0.3 * rows(generator) if changed else x
    weight, bias, keep = problem(generator)
    b = bias if with_bias else torch.zeros_like(bias)
    moments = CrossMoments.of(x, z) if changed else Moments.of(x)
    found = reconstruct(weight, bias if with_bias else None, keep, moments)
    plain = torch.where(keep, weight, 0)
    shifted = b + (x @ weight.T - z @ plain.T).mean(0) if with_bias else b
    after = found.bias if with_bias else b
    assert found.error_before == pytest.approx(measured(x, z, weight, b, plain, b))
    assert found.error_bias == pytest.approx(measured(x, z, weight, b, plain, shifted))
    assert found.error_after == pytest.approx(measured(x, z, weight, b, found.weight, after))
    assert found.error_after < 0.9 * found.error_bias <= 0.9 * found.error_before


def test_errors_of_chosen_rows_are_those_of_the_layer_with_these_rows(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    chosen = torch.tensor([True, False, True, False])
    whole = reconstruct(weight, bias, keep, Moments.of(x), rows=chosen)
    part = reconstruct(weight[chosen], bias[chosen], keep, Moments.of(x))
    assert whole.error_before == pytest.approx(part.error_before)
    assert whole.error_after == pytest.approx(part.error_after)
    torch.testing.assert_close(whole.weight[chosen], part.weight)


def test_a_duplicate_is_removed_without_loss(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    x[:, 1] = 3 * x[:, 0]
    x[:, 4] = x[:, 2] - x[:, 3] + 5
    found = reconstruct(weight, bias, keep, Moments.of(x), damping=0.0)
    torch.testing.assert_close(x @ found.weight.T + found.bias, x @ weight.T + bias)
    assert found.error_after < 1e-12 < 1e-3 < found.error_bias
    assert reconstruct(weight, bias, keep, Moments.of(x)).error_after < 1e-5


def test_the_bias_alone_makes_up_for_constant_inputs(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    x[:, 1], x[:, 4] = 7.0, -3.0
    found = reconstruct(weight, bias, keep, Moments.of(x))
    torch.testing.assert_close(found.bias, bias + 7 * weight[:, 1] - 3 * weight[:, 4])
    torch.testing.assert_close(found.weight[:, keep], weight[:, keep])
    assert found.error_bias < 1e-12 and found.error_after < 1e-12 < found.error_before


def test_transposed_and_convolution_are_the_matrix_rearranged(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    plain = reconstruct(weight, bias, keep, Moments.of(x))
    turned = reconstruct(weight.T.contiguous(), bias, keep, Moments.of(x), Transposed())
    torch.testing.assert_close(turned.weight.T, plain.weight)
    # Three channels of two taps, channels inside: channel 1 is columns 1 and 4.
    kernel = Convolution().restore(weight, torch.Size([4, 3, 2]))
    channels = torch.tensor([True, False, True])
    conv = reconstruct(kernel, bias, channels, Moments.of(x), Convolution())
    assert conv.weight.shape == (4, 3, 2) and not conv.weight[:, 1].any()
    torch.testing.assert_close(Convolution().matrix(conv.weight), plain.weight)
    torch.testing.assert_close(conv.bias, plain.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_taken_after_casting(generator, dtype):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    weight, bias = weight.to(dtype), bias.to(dtype)
    found = reconstruct(weight, bias, keep, Moments.of(x))
    assert found.weight.dtype == found.bias.dtype == dtype
    error = measured(x, x, weight.double(), bias.double(), found.weight.double(), found.bias.double())
    assert found.error_after == pytest.approx(error)


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    damping=st.sampled_from([0.0, 1e-8, 1e-4, 1.0]),
    with_bias=st.booleans(),
    changed=st.booleans(),
    kept=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_never_worse_than_plain_removal(seed, tokens, damping, with_bias, changed, kept):
    g = torch.Generator().manual_seed(seed)
    x = rows(g, tokens)
    x[:, 5] = x[:, 0]  # singular, also with few tokens
    z = x * torch.rand(6, generator=g, dtype=torch.float64) if changed else x
    weight, bias, _ = problem(g)
    weight, bias = weight.float(), bias.float() if with_bias else None
    keep = torch.tensor(kept)
    found = reconstruct(weight, bias, keep, CrossMoments.of(x, z), damping=damping)
    plain = torch.where(keep, weight, 0).double()
    b = bias.double() if with_bias else 0.0
    before = measured(x, z, weight.double(), b, plain, b)
    after = measured(
        x, z, weight.double(), b, found.weight.double(), found.bias.double() if with_bias else 0.0
    )
    assert after <= before * (1 + 1e-6) + 1e-12
    assert found.error_after <= min(found.error_bias, found.error_before)


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_keeping_everything_changes_nothing(generator, damping, with_bias):
    x, (weight, bias, _) = rows(generator), problem(generator)
    weight, bias = weight.float(), bias.float() if with_bias else None
    keep = torch.ones(6, dtype=torch.bool)
    found = reconstruct(weight, bias, keep, Moments.of(x), damping=damping)
    assert torch.equal(found.weight, weight) and (bias is None or torch.equal(found.bias, bias))
    assert found.error_after < 1e-12


def test_a_solution_that_rounding_ruins_is_not_taken(generator):
    a, n = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    x = torch.stack([a, a + 1e-5 * n, n], dim=1)  # the third input is 1e5 times a difference of the others
    weight, bias, keep = torch.ones(2, 3), torch.zeros(2), torch.tensor([True, True, False])
    exact = reconstruct(weight.double(), bias.double(), keep, Moments.of(x), damping=0.0)
    assert exact.error_after < 1e-4 and exact.weight[0, 1] > 1e4
    found = reconstruct(weight.bfloat16(), bias.bfloat16(), keep, Moments.of(x), damping=0.0)
    assert torch.equal(found.weight, (weight * keep).bfloat16())
    assert found.error_after <= found.error_before and any("gained nothing" in n for n in found.notes)


def test_dead_inputs_keep_their_weights_and_no_input_leaves_the_mean(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    x[:, 0] = 0
    found = reconstruct(weight, bias, keep, Moments.of(x))
    torch.testing.assert_close(found.weight[:, 0], weight[:, 0])
    none = reconstruct(weight, bias, torch.zeros(6, dtype=torch.bool), Moments.of(x))
    torch.testing.assert_close(none.bias, (x @ weight.T + bias).mean(0))
    assert not none.weight.any()


def test_damping_is_raised_where_it_must_be(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    x[:, [2, 3, 5]] = x[:, [0, 0, 0]]
    found = reconstruct(weight, bias, keep, Moments.of(x), damping=0.0)
    assert found.damping > 0 and any("raised" in note for note in found.notes)
    least = torch.linalg.lstsq(torch.cat([x[:, :1], torch.ones(200, 1)], 1), x @ weight.T + bias)
    residual = (x @ weight.T + bias - torch.cat([x[:, :1], torch.ones(200, 1)], 1) @ least.solution).square()
    expected = float(residual.sum() / (x @ weight.T + bias).square().sum())
    assert found.error_after == pytest.approx(expected, rel=1e-4)


def test_constant_inputs_and_too_few_tokens_are_said(generator):
    x, (weight, bias, keep) = rows(generator, n=3), problem(generator)
    assert any("3 tokens for 4 kept" in n for n in reconstruct(weight, bias, keep, Moments.of(x)).notes)
    constant = Moments.of(torch.ones(50, 6))
    found = reconstruct(weight, bias, keep, constant)
    assert any("constant" in note for note in found.notes) and found.error_after < 1e-12


def test_large_means_cost_no_digits(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    far = Moments.of(x + 1e6)
    torch.testing.assert_close(far.covariance, Moments.of(x).covariance, rtol=1e-6, atol=1e-6)
    near = reconstruct(weight, bias, keep, Moments.of(x)).weight
    torch.testing.assert_close(reconstruct(weight, bias, keep, far).weight, near, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused(generator):
    x, (weight, bias, keep) = rows(generator), problem(generator)
    moments = Moments.of(x)
    with pytest.raises(MaskError, match="one entry for each of 6 features"):
        reconstruct(weight, bias, keep[:3], moments)
    with pytest.raises(MaskError, match="moments are of 6 inputs"):
        reconstruct(weight[:, :5], bias, keep[:5], moments)
    with pytest.raises(MaskError, match="each of 4 outputs"):
        reconstruct(weight, None, keep, moments, rows=keep)
    with pytest.raises(MaskError, match="the bias has one entry for each of 4 outputs"):
        reconstruct(weight, bias[:1], keep, moments)
    with pytest.raises(SecateurError, match="damping"):
        reconstruct(weight, bias, keep, moments, damping=-1.0)
    weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="weight"):
        reconstruct(weight, bias, keep, moments)
    x[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="moments"):
        reconstruct(problem(generator)[0], bias, keep, Moments.of(x))


def dependent(generator, n, strength=0.3):
    """Rows of 24 inputs that depend on each other."""
    mix = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) / math.sqrt(24)
    return torch.randn(n, 24, generator=generator) @ (torch.eye(24) + strength * mix)


def test_the_damping_is_the_one_that_does_best_on_the_other_half(generator):
    weight, bias = torch.randn(5, 24, generator=generator), torch.randn(5, generator=generator)
    keep = torch.arange(24) >= 6
    x = dependent(generator, 80, 1.0)
    first, second = x[:40], x[40:]
    found = reconstruct(
        weight, bias, keep, Moments.of(x), damping=1e-3, halves=(Moments.of(first), Moments.of(second))
    )

    def error(w, b):
        y = second.double() @ weight.double().T + bias
        return float((y - second.double() @ w.double().T - b).square().sum() / y.square().sum())

    errors = {}
    for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        half = reconstruct(weight.double(), bias.double(), keep, Moments.of(first), damping=damping)
        errors[damping] = error(half.weight, half.bias)
    best = min(errors, key=errors.__getitem__)
    assert 1e-3 < best < 10.0, "the case is too easy to tell anything"
    assert found.damping == best and found.held_out == pytest.approx(errors[best], rel=1e-6)
    again = reconstruct(weight, bias, keep, Moments.of(x), damping=best)
    assert torch.equal(found.weight, again.weight) and torch.equal(found.bias, again.bias)


def test_few_tokens_do_not_make_a_layer_worse_than_plain_removal(generator):
    weight, bias = torch.randn(5, 24, generator=generator), torch.randn(5, generator=generator)
    keep = torch.arange(24) >= 6
    fresh = dependent(generator, 4000)

    def error(w, b):
        return float((fresh @ weight.T + bias - fresh @ w.T - b).square().mean())

    for n in (20, 30, 60, 400):
        x = dependent(generator, n)
        halves = Moments.of(x[: n // 2]), Moments.of(x[n // 2 :])
        chosen = reconstruct(weight, bias, keep, Moments.of(x), halves=halves)
        fitted = reconstruct(weight, bias, keep, Moments.of(x))
        plain = error(weight * keep, bias)
        assert error(chosen.weight, chosen.bias) <= min(
            1.02 * plain, 1.02 * error(fitted.weight, fitted.bias)
        )
        assert n > 60 or error(fitted.weight, fitted.bias) > error(chosen.weight, chosen.bias)


def test_inputs_that_tell_nothing_of_the_removed_ones_leave_the_weights(generator):
    weight, bias = torch.randn(5, 24, generator=generator), torch.zeros(5)
    keep = torch.arange(24) >= 6
    x = torch.randn(60, 24, generator=generator)
    halves = Moments.of(x[:30]), Moments.of(x[30:])
    found = reconstruct(weight, bias, keep, Moments.of(x), halves=halves)
    assert math.isinf(found.damping) and torch.equal(found.weight, weight * keep)
    assert any("held out" in note for note in found.notes)


def test_moments_of_two_halves_are_those_of_all_rows(generator):
    x = torch.randn(50, 4, generator=generator) + 1e3
    z = torch.randn(50, 4, generator=generator) - 5
    for in_turn, first in ((True, [0, 1, 2, 3, 4, 5, 6, 7, 24, 25]), (False, None)):
        sums = Splitting(Joint, in_turn)
        for i, rows in enumerate((slice(0, 8), slice(8, 24), slice(24, 26), slice(26, 50))):
            sums.add(i, x[rows], z[rows])
        halves, whole = sums.moments(), CrossMoments.of(x, z)
        assert sums.count == halves.whole.dense.count == 50
        torch.testing.assert_close(halves.whole.cross, whole.cross, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            halves.whole.pruned.covariance, whole.pruned.covariance, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(halves.whole.dense.mean, whole.dense.mean, rtol=1e-12, atol=0.0)
        if first:
            torch.testing.assert_close(halves.parts[0].cross, CrossMoments.of(x[first], z[first]).cross)
