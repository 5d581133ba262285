"""Reductions of single batches against their formulas, and running sums that merge."""

import pytest
import torch

import secateur as sc
from secateur.stats import Running, need

EXAMPLE_STATS = {
    sc.GradAbs(): lambda w, g: g.abs(),
    sc.GradSquare(): lambda w, g: g**2,
    sc.RowTaylorSquare(): lambda w, g: (g * w).sum(1, keepdim=True) ** 2,
}


@pytest.mark.parametrize("stat", EXAMPLE_STATS, ids=str)
def test_reductions_of_gradients_sum_over_examples(stat):
    w, g = torch.randn(4, 3), torch.randn(6, 4, 3)
    expected = sum(EXAMPLE_STATS[stat](w, one) for one in g)
    torch.testing.assert_close(stat.reduce(w, g), expected)
    assert torch.equal(stat.reduce(w, g[:0]), torch.zeros_like(expected))


@pytest.mark.parametrize(("dtype", "entry"), [(torch.bfloat16, 1.0), (torch.float16, 300.0)])
def test_the_input_norm_of_half_precision_neither_rounds_nor_overflows(dtype, entry):
    # 4097 is no bfloat16, and 300 squared no float16.
    inputs = torch.full((1, 4097, 2), entry, dtype=dtype)
    stat = sc.InputNorm()
    total = stat.reduce(inputs)
    assert torch.equal(total, torch.full((1, 2), 4097 * entry**2, dtype=torch.float64))
    torch.testing.assert_close(stat.value(Running(total, 4097)), torch.full((1, 2), entry * 4097**0.5))


def test_running_sums_add_merge_and_average():
    a, b, whole = (Running(torch.zeros(2)) for _ in range(3))
    parts = [(torch.tensor([1.0, 2.0]), 3), (torch.tensor([4.0, -1.0]), 1), (torch.tensor([7.0, 0.5]), 4)]
    for i, (part, count) in enumerate(parts):
        (a if i < 2 else b).add(part, count)
        whole.add(part, count)
    a.merge(b)
    assert torch.equal(a.total, whole.total) and a.count == whole.count == 8
    assert torch.equal(a.mean(), torch.tensor([12.0, 1.5]) / 8)


def test_a_running_sum_keeps_its_own_precision():
    running = Running(torch.zeros(1, dtype=torch.float64))
    running.add(torch.tensor([1e8]), 1)
    running.add(torch.tensor([1.0]), 1)
    assert running.total.item() == 1e8 + 1


def test_merging_the_statistics_of_two_ranks_gives_those_of_all_data():
    stat, w, g = sc.GradSquare(), torch.randn(4, 3), torch.randn(6, 4, 3)
    ranks = [Running(stat.reduce(w, part), len(part)) for part in g.split([2, 4])]
    ranks[0].merge(ranks[1])
    torch.testing.assert_close(ranks[0].mean(), stat.reduce(w, g) / 6)


def test_a_running_sum_is_saved_and_restored():
    running = Running(torch.randn(3, 2), 5)
    again = Running.from_state_dict(running.state_dict())
    assert torch.equal(again.total, running.total) and again.count == 5
    again.add(torch.ones(3, 2), 1)
    assert not torch.equal(again.total, running.total)


def test_nothing_measured_has_no_mean():
    with pytest.raises(sc.StatsError, match="before anything was measured"):
        Running(torch.zeros(2)).mean()


def test_stats_are_keys_by_value():
    stats = {sc.HutchinsonDiagonal(8): torch.ones(1)}
    assert need(stats, sc.HutchinsonDiagonal(probes=8, seed=0), "X") is stats[sc.HutchinsonDiagonal(8)]
    for other in (sc.HutchinsonDiagonal(9), sc.HutchinsonDiagonal(8, seed=1), sc.ExactDiagonal()):
        with pytest.raises(sc.StatsError, match=r"X needs .* which was not collected"):
            need(stats, other, "X")
