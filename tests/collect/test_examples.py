"""Gradients of single examples: when one backward pass may stand for many, and what happens when not."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.collect import traffic
from secateur.stats import ExampleStat
from tests.reference import (
    Attention,
    BatchStatistics,
    Borrowed,
    Experts,
    Flattened,
    Recurrent,
    TimeFirst,
    close,
    example_gradients,
    examples,
    gpt2,
    next_token,
)

STATS = (sc.GradAbs(), sc.GradSquare(), sc.RowTaylorSquare())
STRANGE = "not the weight of a linear or convolution layer, or a vector"
ONE_BY_ONE = "Gradients were taken one example at a time: "


def held_against_the_definition(
    model: nn.Module, batches, loss=F.cross_entropy, where=None, rtol=1e-5
) -> str:
    """Compares all statistics with a loop over examples; returns the notes."""
    found = sc.collect(model, STATS, batches, loss, where)
    every = [example for x, y in batches for example in examples(x, y)]
    targets = {t.name: t.matrix for t in sc.select(model, where).targets}
    gradients = example_gradients(model, every, loss, targets)
    for name, w in targets.items():
        g, of_layer = gradients[name], found.stats[name]
        assert close(of_layer[sc.GradAbs()], g.abs().mean(0), rtol), name
        assert close(of_layer[sc.GradSquare()], g.square().mean(0), rtol), name
        assert close(of_layer[sc.RowTaylorSquare()], (g * w).sum(2).square().mean(0)[:, None], 10 * rtol), (
            name
        )
    return " ".join(found.notes)


def data(n: int = 6, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape), torch.randint(0, 3, (n,))


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (Attention, (4, 6), f"attention.in_proj_weight is {STRANGE}"),
        (Recurrent, (4, 5), f"lstm.weight_ih_l0 is {STRANGE}"),
        (TimeFirst, (4, 5), "the rows that reach first.weight are not the examples of the batch"),
        (Flattened, (4, 5), "the rows that reach first.weight are not the examples of the batch"),
        (
            BatchStatistics,
            (4, 5),
            "examples influence each other, or a weight is used outside its layer, at first.weight",
        ),
        (
            Borrowed,
            (5,),
            "examples influence each other, or a weight is used outside its layer, at first.weight",
        ),
        (Experts, (4, 5), "the rows that reach router.weight are not the examples of the batch"),
    ],
)
def test_models_for_which_one_pass_is_not_enough(make, shape, reason):
    x, y = data(7, *shape)
    for batches in (
        [(x, y)],
        [(x[:1], y[:1]), (x[1:], y[1:])],
        [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])],
    ):
        assert held_against_the_definition(make(), batches) == f"{ONE_BY_ONE}{reason}."


@pytest.mark.parametrize("make", [TimeFirst, Flattened])
def test_rows_that_coincide_with_the_number_of_examples(make):
    # Two examples of two steps: the rows of the trial are as many as its examples, but are not them.
    for n in (2, 4):
        x, y = data(n, 2, 5)
        assert held_against_the_definition(make(), [(x, y)]).startswith(ONE_BY_ONE)


def test_rows_are_counted_in_every_batch():
    # The first batch sends every token to the second expert, in order; the next does not.
    model, (x, y) = Experts(), data(9, 1, 5)
    with torch.no_grad():
        model.router.weight.copy_(torch.tensor([[-1.0], [1.0]]) * torch.tensor([9.0, 0, 0, 0, 0]))
    x[:4, :, 0] = x[:4, :, 0].abs() + 0.1
    x[4:, :, 0] = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [-1.0]])
    where = sc.Where(exclude="experts.0")
    assert held_against_the_definition(model, [(x[:4], y[:4])], where=where, rtol=1e-4) == ""
    notes = held_against_the_definition(model, [(x[:4], y[:4]), (x[4:], y[4:])], where=where, rtol=1e-4)
    assert notes == f"{ONE_BY_ONE}the rows that reach experts.1.weight are not the examples of the batch."


def test_batches_of_one_example_need_no_other_way():
    x, y = data(3, 4, 5)
    notes = held_against_the_definition(BatchStatistics(), [(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert notes == ""


def test_a_loss_inside_the_model():
    model, ids = gpt2(), torch.randint(0, 50, (5, 6))
    inside = sc.collect(model, STATS, [{"input_ids": ids, "labels": ids}])
    outside = sc.collect(model, STATS, [(ids, ids)], next_token)
    assert inside.notes == (f"{ONE_BY_ONE}the loss is computed inside the model.",)
    assert outside.notes == ()
    for name, of_layer in outside.stats.items():
        for stat in STATS:
            assert close(inside.stats[name][stat], of_layer[stat], 1e-4)


def test_a_loss_that_only_takes_whole_batches():
    def flat(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.flatten())

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).tanh()).flatten(0, 1)  # rows are tokens, targets are not

    x, y = torch.randn(4, 6, 5), torch.randint(0, 3, (4, 6))
    found = sc.collect(Tokens(), STATS, [(x, y)], flat)
    assert found.notes[0].startswith(
        f"{ONE_BY_ONE}one backward pass over a batch failed (Expected input batch_size"
    )
    model = Tokens()
    assert held_against_the_definition(model, [(x, y)], flat).startswith(ONE_BY_ONE)


def test_a_model_that_takes_one_example_only():
    class Single(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise TypeError("one at a time, please")
            return super().forward(x)

    notes = held_against_the_definition(Single(), [data(4, 3, 5)])
    assert notes == f"{ONE_BY_ONE}one backward pass over a batch failed (one at a time, please)."


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_layer_called_on_single_examples(channels):
    # Its channels, in and out, may be as many as the examples of the batch, or of the trial.
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(channels, channels, 2), nn.Linear(channels, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([self.conv(one).mean(1) for one in x]))

    x, y = data(3, channels, 5)
    assert "rows that reach conv.weight" in held_against_the_definition(Loop(), [(x, y)])


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_weight_shared_with_an_embedding(first):
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = {"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}
            for name in (first, *made):
                self.add_module(name, made[name])
            self.embedding.weight = self.head.weight
            self.inner = nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embedding(ids)).tanh())

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    x, y = torch.randint(0, 5, (4, 6)), torch.randint(0, 3, (4, 6))
    where = sc.Where(include="inner", also=f"{first}.weight")
    assert held_against_the_definition(Language(), [(x, y)], loss, where).startswith(ONE_BY_ONE)


def test_layers_that_gradients_do_not_reach_score_zero_with_a_note():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)
            self.used, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.frozen(x)
            return self.head(self.used(h))

    x, y = data(4, 5)
    model = Partial()
    found = sc.collect(model, [sc.GradAbs()], [(x, y)], F.cross_entropy)
    for name in ("frozen.weight", "idle.weight"):
        assert torch.equal(found.stats[name][sc.GradAbs()], torch.zeros(5, 5))
        assert (
            f"GradAbs() of {name} is 0 everywhere: on this data nothing tells its weights apart."
            in found.notes
        )
    assert len(found.notes) == 2
    used = example_gradients(model, examples(x, y), F.cross_entropy, ["used.weight"])["used.weight"]
    assert close(found.stats["used.weight"][sc.GradAbs()], used.abs().mean(0))


def test_activations_changed_in_place_after_a_layer():
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ELU(inplace=True), nn.Linear(4, 3)
    )
    assert held_against_the_definition(model, [data(6, 5)]) == ""


def test_gradients_too_small_to_square_are_compared():
    # Squares of these gradients are 0 in float32; mixing must be seen all the same.
    model, (x, y) = BatchStatistics(), data(4, 4, 5)
    found = sc.collect(
        model, [sc.GradAbs()], [(x, y)], lambda out, target: F.cross_entropy(out, target) * 1e-25
    )
    assert found.notes[0].startswith(ONE_BY_ONE)


@pytest.mark.parametrize("size", [1, 4])
def test_squares_of_half_precision_gradients_do_not_underflow(size):
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), data(4, 5)

    def small(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target) * 1e-3

    exact = sc.collect(model, [sc.GradSquare()], [(x, y)], small).stats["0.weight"]
    half = [(part.half(), target) for part, target in zip(x.split(size), y.split(size), strict=True)]
    found = sc.collect(model.half(), [sc.GradSquare()], half, small).stats["0.weight"]
    assert close(found[sc.GradSquare()], exact[sc.GradSquare()], 0.03)


@dataclass(frozen=True)
class Spy(ExampleStat):
    """Notes the size of every block of gradients."""

    sizes: list[torch.Size] = field(default_factory=list, compare=False)

    def reduce(self, weight: Tensor, gradients: Tensor) -> Tensor:
        self.sizes.append(gradients.shape)
        return gradients.sum(0)


@pytest.mark.parametrize("block", [1, 40, 300, 1 << 20])
def test_blocks_keep_to_their_size_and_do_not_change_the_result(monkeypatch, block):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3)
    )
    x, y = data(9, 2, 4, 4)
    whole = sc.collect(model, STATS, [(x, y)], F.cross_entropy).stats
    monkeypatch.setattr(traffic, "BLOCK", block)
    spy = Spy()
    found = sc.collect(model, (*STATS, spy), [(x, y)], F.cross_entropy)
    assert not found.notes
    for name, of_layer in whole.items():
        for stat in STATS:
            assert close(found.stats[name][stat], of_layer[stat])
    blocks = [size for size in spy.sizes if size[0]]
    # Rows of unfolded inputs, 16 places in 2 groups for the convolution, may outnumber the outputs.
    entries = {9: 9 * 32, 64: 64 * 4}
    assert all(n == 1 or n * entries[width] <= block for n, _, width in blocks)
    assert sum(n for n, _, width in blocks if width == 64) == 9


class OnePlus(nn.Module):
    """A root-mean-square norm whose weight is stored as the difference from one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Scaled(nn.Module):
    """A factor for each channel, and one for all, to a power."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.gamma, self.power = nn.Parameter(torch.rand(6) + 0.5), power

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma**self.power


def with_vectors(power: int) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.GroupNorm(2, 4),
        nn.Tanh(),  # else the next norm takes out what the bias adds
        nn.LayerNorm([3, 3]),
        nn.Flatten(),
        nn.Linear(36, 6),
        OnePlus(6),
        Scaled(power),
        nn.PReLU(),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
        model[3].weight[0] = 0.0  # what it scales cannot be read from its output
    return model


def test_biases_and_norms_need_no_pass_of_their_own():
    x, y = data(7, 3, 5, 5)
    model = with_vectors(1)
    where = sc.Where(also="*")
    assert len(sc.select(model, where).targets) == len(list(model.parameters()))
    assert held_against_the_definition(model, [(x, y), (x.flip(0)[:4], y[:4])], where=where, rtol=1e-4) == ""


def test_a_vector_in_which_its_module_is_not_affine_is_seen():
    x, y = data(5, 3, 5, 5)
    notes = held_against_the_definition(with_vectors(2), [(x, y)], where=sc.Where(also="*"), rtol=1e-4)
    assert notes.startswith(ONE_BY_ONE) and "9.gamma" in notes
