"""Solvers against independent references: a textbook sweep, exact solutions, all subsets of six weights."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import MaskError, NonFiniteError, PatternError, SecateurError, StatsError
from secateur.criteria import OBD, RIA, Magnitude, Wanda
from secateur.patterns import NM, Block, Pattern, PerRow, Unstructured
from secateur.solvers import ALPS, OBS, Quadratic, Select, Solver, SparseGPT, fit
from secateur.solvers.obs import exact
from secateur.solvers.products import Rough
from secateur.solvers.repair import descend
from secateur.testing import check_solver

SOLVERS = (
    SparseGPT(),
    SparseGPT(block=8),
    ALPS(),
    ALPS(iterations=6),
    OBS(),
    Select(Magnitude()),
    Select(Magnitude(), steps=0),
)


def problem(outputs: int, inputs: int, seed: int = 0, tokens: int = 500) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs of unlike scale."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=draw) @ mix * torch.randn(inputs, generator=draw).exp()
    return torch.randn(outputs, inputs, generator=draw), x.T @ x / tokens


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_contract(solver: Solver) -> None:
    check_solver(solver)


def test_the_triangle_is_that_of_the_inverse() -> None:
    _, gram = problem(1, 700)
    objective = Quadratic(gram)
    U = objective.upper_II.double()
    assert torch.equal(U, U.triu())
    damped = (gram / gram.diagonal().mean()).double() + 0.01 * torch.eye(700)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped), rtol=1e-3, atol=2e-3)


def _sweep(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The sweep of the paper on a given mask, column by column in float64."""
    W, U = W.double().clone(), torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
    for j in range(W.shape[1]):
        e = W[:, j].masked_fill(keep[:, j], 0) / U[j, j]
        W[:, j:] -= torch.outer(e, U[j, j:])
    return W * keep


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (Unstructured(), 0.6),
        (PerRow(), 0.3),
        (NM(2, 4), 0.5),
        (NM(2, 4), 0.7),
        (NM(4, 8), 0.5),
        (Block(2, 4), 0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 24, 128])
def test_sparsegpt_is_the_sweep_of_the_paper(pattern: Pattern, sparsity: float, block: int) -> None:
    W, gram = problem(16, 72)
    objective = Quadratic(gram)
    solved = SparseGPT(block=block)(W, objective, pattern, sparsity)
    expected = _sweep(W, objective.H_II, solved.keep)
    torch.testing.assert_close(solved.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_sparsegpt_chooses_by_what_is_left_when_the_sweep_arrives() -> None:
    W, gram = problem(4, 6)
    objective = Quadratic(gram)
    solved = SparseGPT(block=2)(W, objective, Unstructured(), 0.5)
    U = torch.linalg.cholesky(torch.linalg.inv(objective.H_II.double()), upper=True)
    left = W.double().clone()
    for a in (0, 2, 4):
        scores = (left[:, a : a + 2] / U.diagonal()[a : a + 2]).square()
        gone = scores.flatten().argsort()[:4]
        assert set(gone.tolist()) == set((~solved.keep[:, a : a + 2]).flatten().nonzero().flatten().tolist())
        for j in (a, a + 1):
            e = left[:, j].masked_fill(solved.keep[:, j], 0) / U[j, j]
            left[:, j:] -= torch.outer(e, U[j, j:])


def test_fit_reaches_the_exact_solution() -> None:
    W, gram = problem(12, 40)
    objective = Quadratic(gram)
    keep = PerRow().keep(W.abs(), 0.6)
    best = exact(W, keep, objective)
    torch.testing.assert_close(fit(W, keep, objective, steps=200), best, rtol=1e-2, atol=1e-3)
    errors = [objective.error(fit(W, keep, objective, steps=n), W) for n in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.02 * objective.error(best, W)


def test_fit_from_a_start_goes_on_from_there() -> None:
    W, gram = problem(8, 32)
    objective = Quadratic(gram)
    swept = SparseGPT()(W, objective, Unstructured(), 0.6)
    after = objective.error(fit(W, swept.keep, objective, swept.weight, steps=10), W)
    assert after < swept.error
    torch.testing.assert_close(fit(W, swept.keep, objective, swept.weight, steps=0), swept.weight)


@pytest.mark.parametrize("sparsity", [0.03, 0.25, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("inputs", [14, 15, 16, 20, 21, 22])
def test_rows_stay_even_over_blocks(inputs: int, sparsity: float) -> None:
    W, gram = problem(9, inputs)
    kept = SparseGPT(block=7)(W, Quadratic(gram), PerRow(), sparsity).keep.sum(1)
    assert W.numel() - int(kept.sum()) == round(PerRow().reachable(W.shape, sparsity) * W.numel())
    assert int(kept.max() - kept.min()) <= 1


@settings(max_examples=100, deadline=None)
@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 40), seed=st.integers(0, 99), sparsity=st.floats(0, 1)
)
def test_counts_are_exact_for_every_shape(outputs: int, inputs: int, seed: int, sparsity: float) -> None:
    W, gram = problem(outputs, inputs, seed)
    for pattern in (Unstructured(), PerRow()):
        for solver in (SparseGPT(block=7), ALPS(iterations=9)):
            solved = solver(W, Quadratic(gram), pattern, sparsity)
            kept = solved.keep.sum(1)
            asked = pattern.reachable(W.shape, sparsity) * W.numel()
            assert W.numel() - int(kept.sum()) == round(asked)
            if isinstance(pattern, PerRow):
                assert int(kept.max() - kept.min()) <= 1


def test_brute_force_over_all_masks_of_six_weights() -> None:
    found = []
    for seed in range(20):
        W, gram = problem(1, 6, seed)
        objective = Quadratic(gram, damping=1e-5)
        masks = torch.zeros(20, 6, dtype=torch.bool)
        for mask, kept in zip(masks, combinations(range(6), 3), strict=True):
            mask[list(kept)] = True
        best = min(objective.error(exact(W, m[None], objective), W) for m in masks)
        for solver in (SparseGPT(), OBS(), ALPS()):
            solved = solver(W, objective, Unstructured(), 0.5)
            assert solved.error >= best * (1 - 1e-3)
            found.append((type(solver).__name__, solved.error < best * 1.01))
    optimal = {name: sum(hit for n, hit in found if n == name) for name in ("SparseGPT", "OBS", "ALPS")}
    assert optimal["OBS"] >= 12 and optimal["ALPS"] >= 10
    assert optimal["SparseGPT"] < optimal["ALPS"]


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [(Unstructured(), 0.5), (Unstructured(), 0.8), (NM(2, 4), 0.5)], ids=str
)
def test_the_order_of_quality_is_that_of_the_papers(pattern: Pattern, sparsity: float) -> None:
    W, gram = problem(96, 128)
    objective = Quadratic(gram)
    wanda = pattern.keep((W * objective.root_I).abs(), sparsity)
    swept = SparseGPT()(W, objective, pattern, sparsity)
    errors = [
        objective.error(W * pattern.keep(W.abs(), sparsity), W),
        objective.error(W * wanda, W),
        swept.error,
        objective.error(fit(W, swept.keep, objective, swept.weight), W),
        ALPS()(W, objective, pattern, sparsity).error,
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[2]


def test_obs_steps_are_the_best_single_removals() -> None:
    W, gram = problem(1, 8)
    objective = Quadratic(gram)
    kept = torch.ones(1, 8, dtype=torch.bool)
    for n in range(1, 8):
        tries = []
        for j in kept[0].nonzero().flatten().tolist():
            mask = kept.clone()
            mask[0, j] = False
            left = exact(W, mask, objective).double() - W.double()
            tries.append((float((left @ objective.H_II.double() * left).sum()), mask))
        kept = min(tries, key=lambda t: t[0])[1]
        assert torch.equal(OBS()(W, objective, PerRow(), n / 8).keep, kept)


def test_dead_inputs_lose_their_weights_first_and_are_told() -> None:
    W, gram = problem(8, 16)
    gram[3], gram[:, 3] = 0, 0
    for solver in (SparseGPT(), ALPS(), OBS()):
        solved = solver(W, Quadratic(gram), Unstructured(), 0.25)
        assert not solved.keep[:, 3].any()
        assert solved.notes == ("1 of 16 inputs are zero on all data: their weights go first.",)


def test_dependent_inputs_take_more_damping_and_say_so() -> None:
    x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 24)
    objective = Quadratic(x.T @ x, damping=0.0)
    with pytest.raises(NonFiniteError, match="damping"):
        SparseGPT()(torch.ones(2, 24), objective, Unstructured(), 0.5)
    raised = Quadratic(x.T @ x - 1e-2 * 300 * torch.eye(24), damping=1e-3)
    solved = SparseGPT()(torch.randn(2, 24), raised, Unstructured(), 0.5)
    assert any("Damping was raised from 0.001" in note for note in solved.notes)
    assert solved.weight.isfinite().all()


def test_the_scale_of_the_gram_matrix_plays_no_part() -> None:
    W, gram = problem(8, 32)
    for solver in (SparseGPT(), ALPS()):
        a, b = (solver(W, Quadratic(g), Unstructured(), 0.5) for g in (gram, gram * 2.0**20))
        assert torch.equal(a.weight, b.weight)


def test_select_takes_the_mask_of_the_criterion_and_fits_it() -> None:
    W, gram = problem(12, 40)
    objective = Quadratic(gram)
    wanda = PerRow().keep(W.abs() * gram.diagonal().sqrt(), 0.5)
    plain = Select(Wanda(), steps=0)(W, objective, PerRow(), 0.5)
    assert torch.equal(plain.keep, wanda) and torch.equal(plain.weight, W * wanda)
    fitted = Select(Wanda())(W, objective, PerRow(), 0.5)
    assert torch.equal(fitted.keep, wanda)
    torch.testing.assert_close(fitted.weight, fit(W, wanda, objective))
    assert fitted.error < plain.error
    size = W.abs()
    ria = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * gram.diagonal().sqrt().sqrt()
    assert torch.equal(Select(RIA())(W, objective, Unstructured(), 0.5).keep, Unstructured().keep(ria, 0.5))


def test_bad_input() -> None:
    with pytest.raises(StatsError, match="needs GradSquare"):
        Select(OBD())
    with pytest.raises(SecateurError, match="steps"):
        Select(Wanda(), steps=-1)
    W, gram = problem(4, 8)
    with pytest.raises(StatsError, match="square"):
        Quadratic(gram[:4])
    with pytest.raises(StatsError, match="zero everywhere"):
        Quadratic(torch.zeros(4, 4))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Quadratic(gram.masked_fill(torch.eye(8, dtype=torch.bool), float("inf")))
    with pytest.raises(SecateurError, match="damping"):
        Quadratic(gram, damping=-1)
    with pytest.raises(PatternError, match="NM"):
        SparseGPT()(W, Quadratic(gram), NM(2, 4), 0.3)
    with pytest.raises(PatternError, match="one by one"):
        OBS()(W, Quadratic(gram), Block(2, 2), 0.5)
    with pytest.raises(MaskError, match="do not fit"):
        fit(W[:, :7], torch.ones(4, 7, dtype=torch.bool), Quadratic(gram))
    with pytest.raises(SecateurError, match="block"):
        SparseGPT(block=0)
    with pytest.raises(SecateurError, match="penalty"):
        ALPS(penalty=0)


def test_rough_products_are_right_to_two_digits_and_descend_as_far() -> None:
    draw = torch.Generator().manual_seed(0)
    A, X = torch.randn(64, 64, generator=draw), torch.randn(48, 64, generator=draw)
    exact_product = X.double() @ A.double()
    assert float((Rough(A)(X) - exact_product).norm() / exact_product.norm()) < 0.005
    objective = Quadratic(A.T @ A / 64 + torch.eye(64))
    keep = Unstructured().keep(X.abs(), 0.5)
    fitted = objective.error(fit(X, keep, objective, steps=12), X)
    rough = descend(X, keep, objective, X, 12, Rough(objective.unit_II))
    assert not bool(rough[~keep].any())
    assert objective.error(rough, X) == pytest.approx(fitted, rel=2e-3)


def test_sparsegpt_refuses_nan() -> None:
    with pytest.raises(NonFiniteError, match="A weight holds NaN"):
        SparseGPT()(torch.full((4, 8), torch.nan), Quadratic(torch.eye(8)), NM(2, 4), 0.5)
