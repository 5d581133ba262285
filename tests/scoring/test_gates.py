"""Scores from gates, against autograd through gates written into the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.core.errors import SecateurError, StatsError
from secateur.scoring import GroupScore, HeadImportance, JointTaylor, score_groups
from tests.reference import Flattened, TimeFirst, close, gpt2
from tests.scoring.standins import (
    Group,
    Member,
    attention,
    by_loop,
    cnn,
    entries,
    example_gradients,
    labels,
    mlp,
    parameters,
    seeded,
)


def data(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def gate_gradients(forward, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Gradients [n, size] of each example's loss for factors of one: `forward(x, gates)`."""
    found = []
    for i in range(len(x)):
        gates = torch.ones(1, size, requires_grad=True)
        F.cross_entropy(forward(x[i : i + 1], gates), y[i : i + 1]).backward()
        found.append(gates.grad[0])
    return torch.stack(found)


def gated_attention(model, heads_of_unit: int = 1):
    def forward(x: Tensor, gates: Tensor) -> Tensor:
        model.gates = gates.repeat_interleave(heads_of_unit, dim=1)
        try:
            return model(x)
        finally:
            model.gates = None

    return forward


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 3, 1)])
@pytest.mark.parametrize("frozen", [False, True])
def test_head_importance_is_the_gradient_of_a_gate(sizes, frozen):
    model, (queries, kv) = attention()
    x, y = data(7, 4, 8)
    heads = gate_gradients(gated_attention(model), x, y, 4).abs().mean(0)
    pairs = gate_gradients(gated_attention(model, 2), x, y, 2).abs().mean(0)
    model.requires_grad_(not frozen)
    model.zero_grad(set_to_none=True)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = score_groups(
        model, [queries, kv], labels, HeadImportance(normalise=None), batches, F.cross_entropy
    )
    for group, expected in ((queries, heads), (kv, pairs)):
        assert close(found[group].values, expected, 1e-4)
        assert found[group].notes == ()
    assert not close(pairs, heads.view(2, 2).sum(1), 1e-2)  # within a key-value group effects cancel
    normal = score_groups(model, [queries], labels, HeadImportance(), batches, F.cross_entropy)[queries]
    assert close(normal.values, heads / heads.norm(), 1e-4)
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


def test_the_absolute_value_is_inside_the_mean():
    model, (queries, _) = attention()
    x, y = data(16, 4, 8)
    gradients = gate_gradients(gated_attention(model), x, y, 4)
    found = score_groups(model, [queries], labels, HeadImportance(normalise=None), [(x, y)], F.cross_entropy)[
        queries
    ].values
    assert close(found, gradients.abs().mean(0), 1e-4)
    assert not close(found, gradients.mean(0).abs(), 0.2)


def test_neurons_and_filters():
    model, groups = cnn()
    x, y = data(6, 2, 6, 6)
    found = score_groups(model, groups, labels, HeadImportance(None), [(x, y)], F.cross_entropy)
    cuts = {groups[0]: 3, groups[1]: 5}
    for group, at in cuts.items():
        expected = gate_gradients(
            lambda x, gates, at=at: model[at:](model[:at](x) * gates[:, :, None, None]), x, y, group.size
        )
        assert close(found[group].values, expected.abs().mean(0), 1e-4)
        assert found[group].notes == ()
    model, groups = mlp()
    x, y = data(6, 5)
    found = score_groups(model, groups, labels, HeadImportance(None), [(x, y)], F.cross_entropy)
    for group, at in zip(groups, (2, 4), strict=True):
        expected = gate_gradients(lambda x, gates, at=at: model[at:](model[:at](x) * gates), x, y, group.size)
        assert close(found[group].values, expected.abs().mean(0), 1e-4)


class Forked(nn.Module):
    """Two layers take in the same axis, one of them called twice; a third path takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.a = nn.Linear(6, 3)
        self.b = nn.Linear(6, 3)

    def forward(self, x: Tensor, gates: Tensor | float = 1.0) -> Tensor:
        h = self.first(x).relu() * gates
        return self.a(h).tanh() * self.b(h) + self.b(input=2 * h)


def test_a_gate_covers_all_consumers():
    model = seeded(Forked())
    group = Group("g", "neurons", 6, (Member("a.weight", 1, "in"), Member("b.weight", 1, "in")))
    x, y = data(6, 5)
    expected = gate_gradients(model, x, y, 6).abs().mean(0)
    for batches in ([(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(6)]):
        found = score_groups(model, [group], labels, HeadImportance(None), batches, F.cross_entropy)[group]
        assert close(found.values, expected, 1e-4)
        assert found.notes == ()


class Coupled(nn.Module):
    """Subtracts the mean over the batch, so that examples influence each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, gates: Tensor | float = 1.0) -> Tensor:
        h = self.first(x).tanh() * gates
        return self.head(self.second(h - 0.5 * h.mean(0, keepdim=True)).tanh())


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (TimeFirst, (4, 5), "the rows that reach a consumer are not the examples of the batch"),
        (Flattened, (4, 5), "the rows that reach a consumer are not the examples of the batch"),
        (Flattened, (2, 5), "the rows that reach a consumer are not the examples of the batch"),
        (Coupled, (5,), "examples influence each other at g"),
    ],
)
def test_where_one_pass_is_not_enough_examples_come_one_by_one(make, shape, reason):
    model = seeded(make())
    group = Group("g", "neurons", 6, (Member("second.weight", 1, "in"),))
    x, y = data(5, *shape)
    found = score_groups(model, [group], labels, HeadImportance(None), [(x, y)], F.cross_entropy)[group]
    assert found.notes == (f"Gradients were taken one example at a time: {reason}.",)

    def gated(x: Tensor, gates: Tensor) -> Tensor:
        hook = model.second.register_forward_pre_hook(lambda _, args: (args[0] * gates[0],))
        try:
            return model(x)
        finally:
            hook.remove()

    assert close(found.values, gate_gradients(gated, x, y, 6).abs().mean(0), 1e-4)


def test_time_in_front_that_coincides_with_the_number_of_examples():
    model = seeded(TimeFirst())
    group = Group("g", "neurons", 6, (Member("second.weight", 1, "in"),))
    for n in (2, 4):
        x, y = data(n, 2, 5)
        found = score_groups(model, [group], labels, HeadImportance(None), [(x, y)], F.cross_entropy)[group]
        alone = [(x[i : i + 1], y[i : i + 1]) for i in range(n)]
        right = score_groups(model, [group], labels, HeadImportance(None), alone, F.cross_entropy)[group]
        assert close(found.values, right.values, 1e-4)
        assert "one example at a time" in found.notes[0]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("members", ["all", "out", "in", ("out", "along")])
@pytest.mark.parametrize("make", [mlp, cnn, attention])
@pytest.mark.parametrize("frozen", [False, True])
def test_joint_taylor_is_the_sum_over_entries_inside(make, members, power, frozen):
    model, groups = make()
    x, y = data(5, *{mlp: (5,), cnn: (2, 6, 6), attention: (4, 8)}[make])
    gradients = example_gradients(model, x, y)
    model.requires_grad_(not frozen)
    criterion = JointTaylor(power, members)
    found = score_groups(model, groups, labels, criterion, [(x[:2], y[:2]), (x[2:], y[2:])], F.cross_entropy)
    roles = ("out", "in", "along") if members == "all" else members

    def effect(group, unit):
        total = torch.zeros(len(x))
        for m in parameters(model, group, roles):
            w, mask = entries(model, group, unit, m)
            total += torch.stack([(g[m.tensor] * w)[mask].sum() for g in gradients])
        return (total.abs() ** power).mean()

    for group in groups:
        assert close(found[group].values, by_loop(group, lambda u, g=group: effect(g, u)), 1e-3)
        assert found[group].notes == ()
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


def test_joint_taylor_of_a_norm_is_a_gate_after_it():
    # gamma dL/dgamma + beta dL/dbeta is the gradient of a factor after the norm.
    model, (first, _) = cnn()
    norm = Group("norm", "filters", 4, (Member("1.weight", 0, "along"), Member("1.bias", 0, "along")))
    x, y = data(6, 2, 6, 6)
    found = score_groups(model, [norm], labels, JointTaylor(), [(x, y)], F.cross_entropy)[norm].values
    gates = gate_gradients(lambda x, g: model[2:](model[:2](x) * g[:, :, None, None]), x, y, 4)
    assert close(found, gates.abs().mean(0), 1e-4)
    consumers = score_groups(model, [first], labels, JointTaylor(members="in"), [(x, y)], F.cross_entropy)[
        first
    ].values
    same = score_groups(model, [first], labels, HeadImportance(None), [(x, y)], F.cross_entropy)[first].values
    assert close(consumers, same, 1e-4)
    assert close(found, same, 1e-4)  # a ReLU passes a gate through
    apart = score_groups(model, [norm], labels, GroupScore(sc.Taylor()), [(x, y)], F.cross_entropy)[norm]
    assert not close(apart.values, found, 1e-2)


def test_a_loss_inside_the_model():
    model = seeded(gpt2())
    name = "transformer.h.1.mlp.c_proj.weight"
    group = Group("mlp", "neurons", 64, (Member(name, 0, "in"),))
    ids = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    found = score_groups(model, [group], labels, HeadImportance(None), batches)[group]
    assert found.notes == (
        "Gradients were taken one example at a time: the loss is computed inside the model.",
    )
    joint = score_groups(model, [group], labels, JointTaylor(), batches)[group]
    assert close(found.values, joint.values, 1e-3)


def test_normalised_scores_and_silence():
    model, groups = mlp()
    x, y = data(4, 5)
    plain = score_groups(model, groups, labels, JointTaylor(), [(x, y)], F.cross_entropy)
    each = score_groups(model, groups, labels, JointTaylor(normalise="mean"), [(x, y)], F.cross_entropy)
    for g in groups:
        assert close(each[g].values, plain[g].values / plain[g].values.mean(), 1e-9)
    with torch.no_grad():
        model[4].weight.zero_()
    for criterion in (JointTaylor(), HeadImportance()):
        found = score_groups(model, groups, labels, criterion, [(x, y)], F.cross_entropy)
        assert all("nothing tells the units apart" in s.notes[-1] for s in found.values())
    assert score_groups(model, [], labels, HeadImportance(), [(x, y)], F.cross_entropy) == {}


def test_what_is_refused():
    model, groups = mlp()
    x, y = data(4, 5)
    for criterion in (JointTaylor(), HeadImportance()):
        with pytest.raises(StatsError, match="pass batches"):
            score_groups(model, groups, labels, criterion, loss=F.cross_entropy)
        with pytest.raises(StatsError, match="needs a loss"):
            score_groups(model, groups, labels, criterion, [(x, y)])
        with pytest.raises(StatsError, match="does not depend on any weight"):
            detached = lambda out, y: F.cross_entropy(out.detach(), y)  # noqa: E731
            score_groups(model, groups, labels, criterion, [(x, y)], detached)
    with pytest.raises(StatsError, match="finds no weights in first"):
        score_groups(model, [Group("first", "x", 6, ())], labels, JointTaylor(), [(x, y)], F.cross_entropy)
    with pytest.raises(SecateurError, match="power"):
        JointTaylor(3)
    with pytest.raises(SecateurError, match="normalise"):
        HeadImportance("l1")
