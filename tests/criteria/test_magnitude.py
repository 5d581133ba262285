"""Criteria on weights alone: closed forms, and the statistics of the random baseline."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc


def random_scores(seed: int, *sizes: int) -> dict[str, torch.Tensor]:
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])
    criterion = sc.Random(seed)
    stats = sc.collect(model, criterion.needs).stats
    return {name: criterion(model.get_parameter(name).detach(), of) for name, of in stats.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitude_is_the_absolute_weight_to_its_power(dtype):
    w = torch.tensor([[3.0, -4.0], [0.0, 0.5]], dtype=dtype)
    assert torch.equal(sc.Magnitude()(w, {}), torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    assert torch.equal(sc.Magnitude(norm=2)(w, {}), torch.tensor([[9.0, 16.0], [0.0, 0.25]]))
    assert torch.equal(w, torch.tensor([[3.0, -4.0], [0.0, 0.5]], dtype=dtype))


@pytest.mark.parametrize("norm", [0, 3, -1])
def test_magnitude_knows_two_norms(norm):
    with pytest.raises(sc.SecateurError, match=f"1 or 2; got {norm}"):
        sc.Magnitude(norm=norm)


def test_random_repeats_with_its_seed_whatever_else_is_pruned():
    first, again = random_scores(3, 50, 50, 50, 50), random_scores(3, 50, 50, 50)
    assert list(again) == ["0.weight"]
    assert torch.equal(first["0.weight"], again["0.weight"])


def test_random_differs_between_layers_and_seeds():
    seeds = [random_scores(seed, 50, 50, 50, 50) for seed in (0, 1, -1)]
    drawn = [scores for of_seed in seeds for scores in of_seed.values()]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.1


def test_random_is_uniform():
    scores = random_scores(0, 300, 300, 10)["0.weight"].flatten().sort().values.double()
    n = scores.numel()
    assert scores[0] >= 0 and scores[-1] < 1
    # Kolmogorov's distance; 1.95 / sqrt(n) is exceeded by one uniform sample in a thousand.
    steps = torch.arange(n + 1).double() / n
    distance = torch.maximum((steps[1:] - scores).max(), (scores - steps[:-1]).max())
    assert distance < 1.95 / n**0.5


def test_random_leaves_the_generator_of_torch_alone():
    model, criterion, state = nn.Linear(3, 3), sc.Random(), torch.get_rng_state()
    criterion(model.weight.detach(), sc.collect(model, criterion.needs).stats["weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_criterion_says_which_statistic_it_misses():
    with pytest.raises(
        sc.StatsError, match=r"Taylor\(\) needs GradAbs\(\), which was not collected: pass batches="
    ):
        sc.Taylor()(torch.ones(2, 2), {})
