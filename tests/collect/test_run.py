"""`collect` as a whole: independent of how data is batched, and without a trace in the model."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.collect import traffic
from secateur.stats import ActivationStat, Running
from tests.reference import BatchStatistics, Recurrent, close

INDEPENDENT_OF_BATCHES = (
    sc.InputNorm(),
    sc.GradAbs(),
    sc.GradSquare(),
    sc.RowTaylorSquare(),
    sc.GradMean(),
    sc.HessianGradient(2.0),
    sc.ExactDiagonal(),
    sc.SynapticFlow(),
)
ALL = (*INDEPENDENT_OF_BATCHES, sc.HutchinsonDiagonal(4))


def model_() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 4),
        nn.Linear(4, 3),
    )


def data(n: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 4, 4), torch.randint(0, 3, (n,))


def equal(a: sc.Collected, b: sc.Collected) -> bool:
    return a.notes == b.notes and all(
        torch.equal(value, b.stats[name][stat]) for name, of in a.stats.items() for stat, value in of.items()
    )


def test_several_statistics_at_once_are_those_of_one_at_a_time():
    model, (x, y) = model_(), data()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    together = sc.collect(model, ALL, batches, F.cross_entropy)
    for stat in ALL:
        alone = sc.collect(model, [stat], batches, F.cross_entropy)
        for name, of_layer in alone.stats.items():
            assert list(of_layer) == [stat]
            assert torch.equal(of_layer[stat], together.stats[name][stat]), (name, stat)


@pytest.mark.parametrize("sizes", [[1] * 9, [7, 2], [1, 3, 5], [2, 1, 6]], ids=str)
def test_results_do_not_depend_on_how_data_is_batched(sizes):
    model, (x, y) = model_(), data()
    whole = sc.collect(model, INDEPENDENT_OF_BATCHES, [(x, y)], F.cross_entropy)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    split = sc.collect(model, INDEPENDENT_OF_BATCHES, batches, F.cross_entropy)
    assert whole.notes == split.notes == ()
    for name, of_layer in whole.stats.items():
        for stat, value in of_layer.items():
            assert close(split.stats[name][stat], value), (name, stat)


def test_shapes_are_those_of_the_matrix_or_broadcast_to_it():
    model, batches = model_(), [data()]
    collected = sc.collect(model, ALL, batches, F.cross_entropy)
    for t in sc.select(model).targets:
        for stat, value in collected.stats[t.name].items():
            assert torch.broadcast_shapes(value.shape, t.shape) == t.shape, stat
            assert not value.requires_grad
            expected = torch.float64 if isinstance(stat, sc.SynapticFlow) else torch.float32
            assert value.dtype == expected, stat


def test_scores_of_layers_do_not_depend_on_which_others_are_selected():
    model, batches = model_(), [data()]
    needs = [stat for stat in INDEPENDENT_OF_BATCHES if not isinstance(stat, sc.HessianGradient)]
    targets = sc.select(model, sc.Where(include="5")).targets
    every = sc.collect(model, needs, batches, F.cross_entropy)
    one = sc.collect(model, needs, batches, F.cross_entropy, sc.Where(include="5"))
    by_targets = sc.collect(model, needs, batches, F.cross_entropy, targets)
    assert list(one.stats) == ["5.weight"]
    assert equal(one, by_targets)
    for stat, value in one.stats["5.weight"].items():
        assert close(value, every.stats["5.weight"][stat])


class State:
    """All that `collect` must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {name: t.clone() for name, t in model.state_dict().items()}
        self.identities = [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
        self.settings = self.current()

    def current(self) -> list[object]:
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in self.model.modules()
        ]
        return [
            [m.training for m in self.model.modules()],
            [
                (p.requires_grad, None if p.grad is None else p.grad.tolist(), p.dtype)
                for p in self.model.parameters()
            ],
            [p._backward_hooks for p in self.model.parameters()],
            hooks,
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
        ]

    def same(self) -> bool:
        now = self.model.state_dict()
        identities = [id(p) for p in self.model.parameters()] + [id(b) for b in self.model.buffers()]
        return (
            identities == self.identities
            and all(torch.equal(now[name], t) for name, t in self.values.items())
            and self.current() == self.settings
        )


def unusual(model: nn.Module) -> nn.Module:
    """Training mode with one module in evaluation mode, some weights frozen, some with a gradient."""
    model.train()
    modules = list(model.modules())
    modules[-1].eval()
    modules[2].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        if i % 3 == 0:
            p.grad = torch.full_like(p, 3.0)
    return model


@pytest.mark.parametrize("stat", ALL, ids=lambda stat: type(stat).__name__)
@pytest.mark.parametrize("make", [model_, BatchStatistics], ids=["batched", "one by one"])
def test_the_model_is_left_as_it_was(make, stat):
    model = unusual(make())
    x, y = data() if make is model_ else (torch.randn(5, 4, 5), torch.randint(0, 3, (5,)))
    before = State(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)  # draws from torch's generator
    sc.collect(model, [stat], loader, F.cross_entropy)
    assert before.same()
    with torch.no_grad():
        sc.collect(model, [stat], loader, F.cross_entropy)
    assert before.same()


class Failing(nn.Module):
    """Fails after a number of calls."""

    def __init__(self, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.calls == 0:
            raise RuntimeError("the model failed")
        self.calls -= 1
        return out


@pytest.mark.parametrize(
    ("stat", "calls"),
    [(stat, calls) for stat in ALL for calls in (0, 1, 3) if calls == 0 or stat != sc.SynapticFlow()],
    ids=str,
)
def test_the_model_is_left_as_it_was_after_an_error(stat, calls):
    model, batches = Failing(unusual(model_()), calls), [data(), data(1), data(), data()]
    before = State(model)
    with pytest.raises(RuntimeError, match="the model failed"):
        sc.collect(model, [stat], batches, F.cross_entropy)
    assert before.same()


def test_an_interrupted_loader_leaves_the_model_as_it_was():
    model, (x, y) = unusual(model_()), data()
    before = State(model)

    class Interrupted:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield x, y
            raise KeyboardInterrupt

    for stat in ALL[:-3]:
        with pytest.raises(KeyboardInterrupt):
            sc.collect(model, [stat], Interrupted(), F.cross_entropy)
        assert before.same(), stat


def test_evaluation_mode_is_used():
    model, (x, y) = model_(), data()
    model(x)  # running statistics that differ from the batch's
    training = sc.collect(copy.deepcopy(model).train(), ALL, [(x, y)], F.cross_entropy)
    evaluating = sc.collect(copy.deepcopy(model).eval(), ALL, [(x, y)], F.cross_entropy)
    assert equal(training, evaluating)


def test_frozen_models_are_measured_alike():
    model, (x, y) = model_(), data()
    free = sc.collect(model, ALL, [(x, y)], F.cross_entropy)
    assert equal(sc.collect(model.requires_grad_(False), ALL, [(x, y)], F.cross_entropy), free)


def test_wrapped_models_are_looked_through():
    model, (x, y) = model_(), data()
    wrapped = nn.DataParallel(model)
    assert equal(
        sc.collect(wrapped, ALL, [(x, y)], F.cross_entropy), sc.collect(model, ALL, [(x, y)], F.cross_entropy)
    )


def test_weights_alone_need_no_data():
    model = model_()
    assert sc.collect(model, []).stats == {"0.weight": {}, "5.weight": {}}
    assert sc.collect(model, sc.Magnitude().needs).notes == ()
    seeds = [stats[sc.Random().needs[0]] for stats in sc.collect(model, sc.Random().needs).stats.values()]
    assert [seed.dtype for seed in seeds] == [torch.int64] * 2 and seeds[0] != seeds[1]


@dataclass(frozen=True)
class Spy(ActivationStat):
    """Notes the size of every block of inputs."""

    sizes: list[torch.Size] = field(default_factory=list, compare=False)

    def reduce(self, inputs: Tensor) -> Tensor:
        self.sizes.append(inputs.shape)
        return inputs.sum(1)

    def value(self, running: Running) -> Tensor:
        return running.mean()


@pytest.mark.parametrize("block", [1, 200, 1000, 1 << 20])
def test_blocks_of_inputs_keep_to_their_size_and_do_not_change_the_result(monkeypatch, block):
    model, (x, y) = model_(), data()
    whole = sc.collect(model, [sc.InputNorm()], [(x, y)]).stats
    monkeypatch.setattr(traffic, "BLOCK", block)
    spy = Spy()
    found = sc.collect(model, [sc.InputNorm(), spy], [(x[:5], y[:5]), (x[5:], y[5:])]).stats
    for name, of_layer in whole.items():
        assert close(found[name][sc.InputNorm()], of_layer[sc.InputNorm()])
    of_one = {9: 2 * 16 * 9, 64: 64}  # unfolded inputs of one example
    tokens = {9: 16, 64: 1}
    for size in spy.sizes:
        assert size.numel() <= max(block, of_one[size[2]])
    for width in of_one:
        assert sum(size[1] for size in spy.sizes if size[2] == width) == 9 * tokens[width]
    # Values are means over tokens, so the count behind them is right too.
    assert close(found["5.weight"][spy][0], inputs_of_the_linear_layer(model, x).mean(0))


def inputs_of_the_linear_layer(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).eval()[:5](x).detach()


def test_recurrent_weights_are_measured_by_the_definition():
    model, x, y = Recurrent(), torch.randn(6, 4, 5), torch.randint(0, 3, (6,))
    whole = sc.collect(model, [sc.GradAbs(), sc.GradMean()], [(x, y)], F.cross_entropy)
    split = sc.collect(
        model, [sc.GradAbs(), sc.GradMean()], [(x[:2], y[:2]), (x[2:], y[2:])], F.cross_entropy
    )
    assert sorted(whole.stats) == ["lstm.weight_hh_l0", "lstm.weight_ih_l0"]
    for name, of_layer in whole.stats.items():
        for stat, value in of_layer.items():
            assert close(split.stats[name][stat], value)
