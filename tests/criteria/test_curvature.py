"""Second-order criteria against explicit Hessians, closed forms and finite differences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import secateur as sc
from tests.reference import (
    Recurrent,
    close,
    example_gradients,
    examples,
    gpt2,
    hessian,
    next_token,
    weight,
)

NAMES = ["0.weight", "2.weight"]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 3)).double().eval()


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3).double(), torch.randint(0, 3, (n,))


def measured(model, stat, batches, loss=F.cross_entropy, names=NAMES) -> Tensor:
    stats = sc.collect(model, [stat], batches, loss).stats
    return torch.cat([stats[name][stat].flatten() for name in names]).double()


def explicit(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 1) -> Tensor:
    return hessian(model, NAMES, lambda f: F.cross_entropy(f(x) / temperature, y))


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 1) -> Tensor:
    weights = [model.get_parameter(name) for name in NAMES]
    grads = torch.autograd.grad(F.cross_entropy(model(x) / temperature, y), weights)
    return torch.cat([g.flatten() for g in grads])


def test_exact_diagonal_is_the_diagonal_of_the_hessian():
    model, (x, y) = classifier(), data()
    found = measured(model, sc.ExactDiagonal(), [(x, y)])
    assert close(found, explicit(model, x, y).diagonal())


def test_exact_diagonal_weighs_batches_by_their_examples():
    model, (x, y) = classifier(), data(7)
    found = measured(model, sc.ExactDiagonal(), [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])])
    assert close(found, explicit(model, x, y).diagonal())


def test_exact_diagonal_of_a_convolution_is_in_the_order_of_its_matrix():
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x, y = torch.randn(3, 2, 3, 3).double(), torch.randint(0, 2, (3,))
    stats = sc.collect(model, [sc.ExactDiagonal()], [(x, y)], F.cross_entropy).stats
    expected = hessian(model, ["0.weight"], lambda f: F.cross_entropy(f(x), y)).diagonal()
    found = stats["0.weight"][sc.ExactDiagonal()]
    assert close(found, expected.view(2, 2, 2, 2).permute(0, 2, 3, 1).flatten(1))


def test_least_squares_in_closed_form():
    # For the mean of (w x - t)^2 over n examples the Hessian is 2/n X^T X.
    model, x = nn.Linear(4, 1, bias=False), torch.randn(50, 4)
    found = measured(model, sc.ExactDiagonal(), [(x, torch.randn(50, 1))], F.mse_loss, ["weight"])
    assert close(found, (x.T @ x).diagonal() * 2 / 50)


@pytest.mark.parametrize("diagonal", [sc.ExactDiagonal(), sc.HutchinsonDiagonal(probes=3)])
def test_obd_is_the_exact_increase_at_the_minimum_of_a_separable_quadratic(diagonal):
    # With orthogonal inputs the loss is quadratic along each axis, and probes have no variance.
    q, _ = torch.linalg.qr(torch.randn(8, 5).double())
    x, w = q * torch.linspace(0.5, 3, 5).double(), torch.randn(1, 5).double()
    model = nn.Linear(5, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)
    y = x @ w.T
    criterion = sc.OBD(diagonal)
    stats = sc.collect(model, criterion.needs, [(x, y)], F.mse_loss).stats["weight"]
    increases = []
    for i in range(5):
        pruned = w.clone()
        pruned[0, i] = 0
        increases.append(F.mse_loss(x @ pruned.T, y))
    assert close(criterion(w, stats)[0], torch.stack(increases))


def test_obd_counts_negative_curvature_as_none():
    stats = {sc.ExactDiagonal(): torch.tensor([[-2.0, 4.0]])}
    assert torch.equal(
        sc.OBD(sc.ExactDiagonal())(torch.tensor([[1.0, -3.0]]), stats), torch.tensor([[0.0, 18.0]])
    )


def test_hutchinson_is_unbiased_with_the_variance_of_the_diagonal_estimator():
    model, (x, y) = classifier(), data()
    h = explicit(model, x, y)
    off_diagonal = h.square().sum(1) - h.diagonal().square()  # variance of one probe, without a factor 2
    probes = 2000
    found = measured(model, sc.HutchinsonDiagonal(probes=probes), [(x, y)])
    standard_error = (off_diagonal / probes).sqrt()
    assert bool(((found - h.diagonal()).abs() <= 5 * standard_error + 1e-6).all())
    single = torch.stack([measured(model, sc.HutchinsonDiagonal(1, seed), [(x, y)]) for seed in range(250)])
    ratio = single.var(0).sum() / off_diagonal.sum()
    assert 0.8 < ratio < 1.2


def test_hutchinson_draws_new_probes_for_each_batch_and_repeats_with_the_seed():
    model, (x, y) = classifier(), data()
    h = explicit(model, x, y).diagonal()
    once = measured(model, sc.HutchinsonDiagonal(1), [(x, y)])
    often = measured(model, sc.HutchinsonDiagonal(1), [(x, y)] * 400)
    assert (often - h).norm() < (once - h).norm() / 4
    assert torch.equal(once, measured(model, sc.HutchinsonDiagonal(1), [(x, y)]))
    assert not torch.equal(once, measured(model, sc.HutchinsonDiagonal(1, seed=1), [(x, y)]))


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    for stat in (sc.ExactDiagonal(), sc.HutchinsonDiagonal(2), sc.HessianGradient(1)):
        found = sc.collect(model, [stat], [(x, x)], lambda out, target: out.mean())
        assert torch.equal(found.stats["weight"][stat], torch.zeros(1, 3))
        assert len(found.notes) == 1


def test_grad_square_is_the_empirical_fisher_of_single_examples():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    fisher = (
        example_gradients(model, examples(x, y), F.cross_entropy, ["0.weight"])["0.weight"].square().mean(0)
    )
    for size in (1, 7, 64):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        stats = sc.collect(model, sc.OBD().needs, batches, F.cross_entropy).stats["0.weight"]
        assert close(stats[sc.GradSquare()], fisher)
        assert close(sc.OBD()(weight(model, "0.weight"), stats), fisher * weight(model, "0.weight") ** 2 / 2)


def test_squared_gradients_of_batch_means_would_be_too_small_by_the_batch_size():
    # The error of published code: with independent gradients it loses a factor of the batch size.
    model = nn.Linear(5, 3, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.randn(4096, 5), torch.randint(0, 3, (4096,))
    batches = list(zip(x.split(64), y.split(64), strict=True))
    right = sc.collect(model, [sc.GradSquare()], batches, F.cross_entropy).stats["weight"][sc.GradSquare()]
    wrong = [torch.autograd.grad(F.cross_entropy(model(a), b), model.weight)[0] ** 2 for a, b in batches]
    ratio = right.mean() / torch.stack(wrong).mean()
    assert 64 * 0.8 < ratio < 64 * 1.25


def test_the_exact_diagonal_refuses_large_models():
    with pytest.raises(sc.StatsError, match=r"12 are selected, above the limit of 5: use HutchinsonDiagonal"):
        sc.collect(nn.Linear(4, 3), [sc.ExactDiagonal(limit=5)], [data()], F.cross_entropy)


def test_double_backward_passes_through_fused_attention():
    model, ids = gpt2(), torch.randint(0, 50, (3, 6))
    where = sc.Where(include="*.0.attn.c_proj")
    name, stat = "transformer.h.0.attn.c_proj.weight", sc.HutchinsonDiagonal(200)
    found = sc.collect(model, [stat], [(ids, ids)], next_token, where).stats[name][stat]
    with sdpa_kernel(SDPBackend.MATH):
        h = hessian(model.eval(), [name], lambda f: next_token(f(ids), ids))
    variance = h.square().sum(1) - h.diagonal().square()
    error = (found.t().flatten() - h.diagonal()).abs()
    assert bool((error <= 5 * (variance / 200).sqrt() + 1e-6).all())


def test_double_backward_passes_through_recurrent_layers():
    model, x, y = Recurrent(), torch.randn(3, 4, 5), torch.randint(0, 3, (3,))
    found = sc.collect(model, [sc.ExactDiagonal()], [(x, y)], F.cross_entropy).stats
    h = hessian(model.eval(), ["lstm.weight_hh_l0"], lambda f: F.cross_entropy(f(x), y))
    assert close(found["lstm.weight_hh_l0"][sc.ExactDiagonal()].flatten(), h.diagonal(), 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_weight_times_hessian_gradient(temperature):
    model, (x, y) = classifier(), data()
    expected = explicit(model, x, y, temperature) @ flat_gradient(model, x, y, temperature)
    criterion = sc.GraSP(temperature)
    found = measured(model, criterion.needs[0], [(x, y)])
    assert close(found, expected)
    stats = {criterion.needs[0]: expected[:12].view(4, 3)}
    w = weight(model, "0.weight")
    assert close(criterion(w, stats), w * expected[:12].view(4, 3))


def test_grasp_over_several_batches_equals_one_batch():
    model, (x, y) = classifier(), data(7)
    stat = sc.GraSP().needs[0]
    split = measured(model, stat, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])])
    assert close(split, measured(model, stat, [(x, y)]))


def test_shrinking_the_weight_of_lowest_grasp_score_raises_the_gradient_norm_most():
    # Scaling weight i by 1 - eps changes |g|^2 by -2 eps w_i (H g)_i: what scores lowest may go.
    model, (x, y) = classifier(), data()
    criterion, eps = sc.GraSP(temperature=1), 1e-6
    stats = sc.collect(model, criterion.needs, [(x, y)], F.cross_entropy).stats
    scores = torch.cat([criterion(weight(model, n), stats[n]).flatten() for n in NAMES])
    before, changes = flat_gradient(model, x, y).square().sum(), []
    for name in NAMES:
        for i in range(model.get_parameter(name).numel()):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                scaled.get_parameter(name).view(-1)[i] *= 1 - eps
            changes.append((flat_gradient(scaled, x, y).square().sum() - before) / eps)
    changes = torch.stack(changes)
    assert close(changes, -2 * scores, 1e-4)
    assert int(changes.argmax()) == int(scores.argmin())
    assert changes.max() > 0


def test_grasp_says_what_its_temperature_needs():
    model, ids = gpt2(), torch.randint(0, 50, (3, 6))
    with pytest.raises(
        sc.StatsError, match=r"one tensor and loss= must be given; or set GraSP\(temperature=1\)"
    ):
        sc.collect(model, sc.GraSP().needs, [(ids, ids)], next_token)
    found = sc.collect(model, sc.GraSP(1).needs, [{"input_ids": ids, "labels": ids}]).stats
    same = sc.collect(model, sc.GraSP(1).needs, [(ids, ids)], next_token).stats
    name = "transformer.h.1.mlp.c_fc.weight"
    assert close(found[name][sc.HessianGradient(1)], same[name][sc.HessianGradient(1)], 1e-4)


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_grasp_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(sc.SecateurError, match="is positive"):
        sc.GraSP(temperature=temperature)
