"""Wanda and RIA against their formulas, written out entry by entry."""

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.reference import close


def literal(w: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Wanda and RIA with power 0.5, for norms [in]."""
    wanda, ria = torch.zeros_like(w), torch.zeros_like(w)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            column = sum(abs(w[k, j]) for k in range(w.shape[0]))
            row = sum(abs(w[i, k]) for k in range(w.shape[1]))
            wanda[i, j] = abs(w[i, j]) * norms[j]
            ria[i, j] = (abs(w[i, j]) / column + abs(w[i, j]) / row) * norms[j] ** 0.5
    return wanda, ria


def test_linear_layers_on_sequences():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
    batches = [torch.randn(2, 6, 5), torch.randn(3, 6, 5), torch.randn(4, 5)]
    stats = sc.collect(model, [sc.InputNorm()], batches).stats
    seen = torch.cat([x.reshape(-1, 5) for x in batches])
    for layer, tokens in ((0, seen), (2, model[:2](seen).detach())):
        w = model[layer].weight.detach()
        norms = torch.tensor([sum(t.item() ** 2 for t in column) ** 0.5 for column in tokens.T])
        of_layer = stats[f"{layer}.weight"]
        assert close(of_layer[sc.InputNorm()], norms[None])
        wanda, ria = literal(w, norms)
        assert close(sc.Wanda()(w, of_layer), wanda)
        assert close(sc.RIA()(w, of_layer), ria)


def test_wanda_estimates_the_change_of_the_output_when_one_weight_goes():
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(30, 6)
    stats = sc.collect(layer, [sc.InputNorm()], [x]).stats["weight"]
    w = layer.weight.detach()
    for i, j in [(0, 0), (3, 5), (2, 1)]:
        pruned = w.clone()
        pruned[i, j] = 0
        assert sc.Wanda()(w, stats)[i, j].item() == pytest.approx(
            (x @ (w - pruned).T).norm().item(), rel=1e-5
        )


def test_ria_without_power_is_the_relative_importance_alone():
    w, stats = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), {sc.InputNorm(): torch.tensor([[0.0, 5.0]])}
    expected = torch.tensor([[1 / 3 + 1 / 4, 3 / 5 + 3 / 4], [2 / 3 + 2 / 4, 2 / 5 + 2 / 4]])
    assert close(sc.RIA(power=0)(w, stats), expected)


def test_ria_gives_no_share_to_rows_and_columns_of_zeros():
    w = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, -2.0]])
    scores = sc.RIA()(w, {sc.InputNorm(): torch.full((1, 3), 4.0)})
    assert torch.equal(scores, torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 3.0]]))


@pytest.mark.parametrize("power", [-0.5, float("nan")])
def test_ria_refuses_a_negative_power(power):
    with pytest.raises(sc.SecateurError, match="is not negative"):
        sc.RIA(power=power)


def test_half_precision_weights_score_in_float32():
    model = nn.Linear(5, 4).bfloat16()
    stats = sc.collect(model, [sc.InputNorm()], [torch.randn(7, 5).bfloat16()]).stats["weight"]
    for criterion in (sc.Wanda(), sc.RIA()):
        assert criterion(model.weight.detach(), stats).dtype == torch.float32
