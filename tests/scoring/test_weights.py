"""Scores of weights summed to units, against loops over units, members and entries."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.core.errors import SecateurError, SelectionError, StatsError
from secateur.scoring import FPGM, GroupScore, JointTaylor, score_groups
from tests.reference import close, gpt2
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

MODELS = [mlp, cnn, attention]
SHAPES = {mlp: (5,), cnn: (2, 6, 6), attention: (4, 8)}


def data(make, n: int = 5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *SHAPES[make], generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("within", ["sum", "l1", "l2", "mean", "max"])
@pytest.mark.parametrize("across", ["sum", "mean", "max"])
def test_every_reduction_by_loops(make, within, across):
    model, groups = make()
    found = score_groups(model, groups, labels, GroupScore(sc.Magnitude(), within, across))

    def member_score(group, unit, member):
        tensor, mask = entries(model, group, unit, member)
        values = tensor[mask].abs().double()
        squares = values.square().sum()
        sums = {"sum": values.sum(), "l1": values.sum(), "mean": values.mean(), "max": values.max()}
        return squares if within == "l2" else sums[within]

    for group in groups:
        parts = torch.stack(
            [by_loop(group, lambda u, g=group, m=m: member_score(g, u, m)) for m in parameters(model, group)]
        )
        expected = {"sum": parts.sum(0), "mean": parts.mean(0), "max": parts.amax(0)}[across]
        assert close(found[group].values, expected.sqrt() if within == "l2" else expected, 1e-6)
        assert found[group].notes == ()


def test_l2_of_magnitude_is_the_norm_of_all_entries_of_the_unit():
    # Torch-Pruning's group magnitude by hand: rows 3, 4 and 0, 0; biases 12 and 1; columns 84 and 0.
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([12.0, -1.0]))
        model[2].weight.copy_(torch.tensor([[84.0, 0.0]]))
    group = Group(
        "g",
        "neurons",
        2,
        (Member("0.weight", 0, "out"), Member("0.bias", 0, "along"), Member("2.weight", 1, "in")),
    )
    criterion = GroupScore(sc.Magnitude(), within="l2")
    assert score_groups(model, [group], labels, criterion)[group].values.tolist() == [85.0, 1.0]
    squares = score_groups(model, [group], labels, GroupScore(sc.Magnitude(2)))[group].values
    assert squares.tolist() == [7225.0, 1.0]


@pytest.mark.parametrize("how", ["mean", "max", "sum", "l2"])
def test_normalisation_of_groups_and_of_members(how):
    model, groups = cnn()
    norm = {"mean": torch.mean, "max": torch.max, "sum": torch.sum, "l2": torch.linalg.norm}[how]
    plain = score_groups(model, groups, labels, sc.Magnitude())
    for group, scores in score_groups(
        model, groups, labels, GroupScore(sc.Magnitude(), normalise=how)
    ).items():
        assert close(scores.values, plain[group].values / norm(plain[group].values), 1e-12)
    each = score_groups(model, groups, labels, GroupScore(sc.Magnitude(), normalise_members=how))
    for group, scores in each.items():
        expected = 0
        for member in parameters(model, group):
            part = by_loop(group, lambda u, m=member, g=group: masked_sum(model, g, u, m))
            expected = expected + part / norm(part)
        assert close(scores.values, expected, 1e-6)


def masked_sum(model, group, unit, member):
    tensor, mask = entries(model, group, unit, member)
    return tensor[mask].abs().sum()


def test_a_group_of_zeros_is_left_as_it_is():
    model, groups = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = score_groups(model, groups, labels, GroupScore(sc.Magnitude(), normalise="mean"))
    assert not any(s.values.any() for s in found.values())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("criterion", [sc.Taylor(), sc.TaylorSquared(), sc.OBD(), sc.SNIP()])
@pytest.mark.parametrize("frozen", [False, True])
def test_criteria_of_gradients_reach_every_kind_of_member(make, criterion, frozen):
    model, groups = make()
    x, y = data(make)
    gradients = example_gradients(model, x, y)
    model.requires_grad_(not frozen)
    found = score_groups(model, groups, labels, criterion, [(x[:3], y[:3]), (x[3:], y[3:])], F.cross_entropy)

    def entry_scores(name):
        w = model.get_parameter(name).detach()
        products = torch.stack([g[name] * w for g in gradients])
        if isinstance(criterion, sc.SNIP):
            return products.mean(0).abs()
        if isinstance(criterion, sc.Taylor):
            return products.abs().mean(0)
        return products.square().mean(0) * (0.5 if isinstance(criterion, sc.OBD) else 1)

    for group in groups:
        expected = sum(
            by_loop(group, lambda u, m=m, g=group: entry_scores(m.tensor)[entries(model, g, u, m)[1]].sum())
            for m in parameters(model, group)
        )
        assert close(found[group].values, expected, 1e-4)
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [mlp, attention])
def test_wanda_leaves_out_biases_with_a_note(make):
    model, groups = make()
    x, y = data(make)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2).norm(dim=0))
            )
    model(x)
    found = score_groups(model, groups, labels, sc.Wanda(), [(x, y)])
    for group in groups:
        expected = 0
        for m in parameters(model, group, ("out", "in")):
            s = model.get_parameter(m.tensor).detach().abs() * inputs[m.tensor.rpartition(".")[0]]
            expected = expected + by_loop(
                group, lambda u, m=m, g=group, s=s: s[entries(model, g, u, m)[1]].sum()
            )
        assert close(found[group].values, expected, 1e-5)
        (note,) = found[group].notes
        assert note.startswith("Left out, because InputNorm is measured on the inputs of linear")
        assert all(m.tensor in note for m in parameters(model, group, ("along",)))


def test_nothing_left_to_score():
    model, groups = mlp()
    x, y = data(mlp)
    with pytest.raises(StatsError, match=r"Wanda\(\) can score no member of first \(members='along'\)"):
        score_groups(model, groups, labels, GroupScore(sc.Wanda(), members="along"), [(x, y)])


class Bare(nn.Module):
    """Its first layer's weight is used by a function, so that no input reaches the module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(F.linear(x, self.first.weight, self.first.bias).relu())


@pytest.mark.parametrize("generator", [False, True])
def test_a_layer_that_is_never_called_is_left_out(generator):
    model = seeded(Bare())
    members = (Member("first.weight", 0, "out"), Member("second.weight", 1, "in"))
    group = Group("g", "neurons", 6, members)
    x = torch.randn(4, 5)
    batches = iter([x]) if generator else [x]
    found = score_groups(model, [group], labels, sc.Wanda(), batches)[group]
    assert found.notes == ("Left out, because its module was never called: first.weight.",)
    hidden = F.linear(x, model.first.weight, model.first.bias).relu()
    assert close(found.values, (model.second.weight.abs() * hidden.norm(dim=0)).sum(0).detach(), 1e-5)
    with pytest.raises(StatsError, match="never called"):
        score_groups(model, [group], labels, GroupScore(sc.Wanda(), members="out"), [x])


def test_rows_are_the_units_of_taylor_group():
    model, groups = cnn()
    x, y = data(cnn)
    gradients = example_gradients(model, x, y)
    found = score_groups(model, groups, labels, sc.TaylorGroup(), [(x, y)], F.cross_entropy)
    for group, name in zip(groups, ("0.weight", "3.weight"), strict=True):
        w = model.get_parameter(name).detach()
        expected = torch.stack([(g[name] * w).flatten(1).sum(1).square() for g in gradients]).mean(0)
        assert close(found[group].values, expected, 1e-4)
        assert "a unit is not made of rows" in found[group].notes[0]


def test_transposed_layers_and_a_fused_projection():
    # GPT-2 stores [in, out] and one matrix for queries, keys and values.
    model = seeded(gpt2())
    block = "transformer.h.0.attn"
    fused = torch.cat([torch.arange(2).repeat_interleave(8)] * 3)
    members = {
        (f"{block}.c_attn.weight", 1): ("out", fused),
        (f"{block}.c_attn.bias", 0): ("along", fused),
        (f"{block}.c_proj.weight", 0): ("in", fused[:16]),
    }
    group = Group(
        "heads",
        "heads",
        2,
        tuple(Member(*k, r) for k, (r, _) in members.items()),
        {k: u for k, (_, u) in members.items()},
    )
    ids = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    found = score_groups(model, [group], labels, sc.Magnitude())[group].values
    expected = sum(by_loop(group, lambda u, m=m: masked_sum(model, group, u, m)) for m in group.members)
    assert close(found, expected, 1e-6)
    batches = [{"input_ids": ids, "labels": ids}]
    taylor = score_groups(model, [group], labels, sc.Taylor(), batches)[group]
    assert taylor.values.min() > 0
    assert "one example at a time" in taylor.notes[0]
    rows = score_groups(model, [group], labels, sc.TaylorGroup(), batches)[group]
    assert f"{block}.c_proj.weight" in rows.notes[0]
    assert f"{block}.c_attn.weight" not in rows.notes[0]


class Residual(nn.Module):
    """A square weight whose rows and columns are the same axis; the embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.mix(x))


def test_tied_tensors_count_once_and_square_ones_twice():
    model = seeded(Residual())
    members = (
        Member("embed.weight", 1, "out"),
        Member("head.weight", 1, "in"),
        Member("mix.weight", 0, "out"),
        Member("mix.weight", 1, "in"),
    )
    group = Group("width", "width", 4, members)
    found = score_groups(model, [group], labels, sc.Magnitude())[group].values
    embed, mix = model.embed.weight.detach().abs(), model.mix.weight.detach().abs()
    assert close(found, embed.sum(0) + mix.sum(0) + mix.sum(1), 1e-6)


@settings(max_examples=25)
@given(
    order=st.permutations(range(9)),
    criterion=st.sampled_from(
        [GroupScore(sc.Magnitude()), GroupScore(sc.Magnitude(), "l2"), FPGM(), JointTaylor()]
    ),
)
def test_the_order_of_members_is_of_no_consequence(order, criterion):
    model, (_, kv) = attention()
    members = (*kv.members, *kv.members[:2])
    shuffled = replace(kv, members=tuple(members[i] for i in order))
    batches = [data(attention, 2)]
    a, b = (
        score_groups(model, [g], labels, criterion, batches, F.cross_entropy)[g].values
        for g in (kv, shuffled)
    )
    assert torch.equal(a, b)


def test_units_outside_the_group_are_left_out():
    model, (first, _) = mlp()
    part = torch.tensor([-1, 0, -1, 1, 1, -1])
    group = Group("part", "neurons", 2, first.members, {(m.tensor, m.dim): part for m in first.members})
    found = score_groups(model, [group], labels, sc.Magnitude())[group].values
    every = score_groups(model, [first], labels, sc.Magnitude())[first].values
    assert close(found, torch.stack([every[1], every[3] + every[4]]), 1e-12)


def test_a_unit_held_by_some_members_only():
    # A concatenation: each half of the axis is made by another layer.
    model = seeded(nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}))
    members = (Member("a.weight", 0, "out"), Member("b.weight", 0, "out"))
    halves = {("a.weight", 0): torch.tensor([0, 1]), ("b.weight", 0): torch.tensor([2, 3])}
    group = Group("g", "neurons", 4, members, halves)
    rows = torch.cat([model["a"].weight, model["b"].weight]).detach().abs()
    for across in ("sum", "mean", "max"):
        for within, expected in [("sum", rows.sum(1)), ("max", rows.amax(1)), ("mean", rows.mean(1))]:
            found = score_groups(model, [group], labels, GroupScore(sc.Magnitude(), within, across))
            assert close(found[group].values, expected, 1e-6)
    lost = replace(group, members=members[:1])
    with pytest.raises(StatsError, match="Unit 2 of g has no weight"):
        score_groups(model, [lost], labels, sc.Magnitude())


def test_random_draws_one_number_a_unit():
    model, groups = mlp()
    found = score_groups(model, groups, labels, sc.Random(3))
    again = score_groups(model, groups[::-1], labels, sc.Random(3))
    other = score_groups(model, groups, labels, sc.Random(4))
    for g in groups:
        assert torch.equal(found[g].values, again[g].values)
        assert not torch.equal(found[g].values, other[g].values)
        assert 0 <= found[g].values.min() < found[g].values.max() <= 1
    assert not torch.equal(found[groups[0]].values[:4], found[groups[1]].values)


def test_negative_scores_have_no_norm():
    model, groups = mlp()
    x, y = data(mlp)
    for within in ("l1", "l2"):
        with pytest.raises(SecateurError, match="negative scores"):
            score_groups(model, groups, labels, GroupScore(sc.GraSP(), within), [(x, y)], F.cross_entropy)
    found = score_groups(model, groups, labels, sc.GraSP(), [(x, y)], F.cross_entropy)
    assert any((s.values < 0).any() for s in found.values())


def test_synflow_knows_no_biases():
    model, groups = mlp()
    found = score_groups(model, groups, labels, sc.SynFlow(), [torch.randn(1, 5)])
    w = [model[i].weight.detach().double().abs() for i in (0, 2, 4)]
    flow = w[0].sum(1) * (w[2].sum(0) @ w[1])  # all that flows through a neuron, once in and once out
    assert close(found[groups[0]].values, 2 * flow, 1e-9)
    assert found[groups[0]].notes == ("Left out, because biases are no part of the flow: 0.bias.",)


def test_what_is_refused():
    model, groups = mlp()
    with pytest.raises(SecateurError, match="not the class Magnitude"):
        score_groups(model, groups, labels, sc.Magnitude)
    with pytest.raises(SecateurError, match="within"):
        GroupScore(sc.Magnitude(), "l3")
    with pytest.raises(SecateurError, match="members"):
        GroupScore(sc.Magnitude(), members="outside")
    with pytest.raises(SecateurError, match="takes a criterion of weights"):
        GroupScore(sc.Magnitude)
    with pytest.raises(SelectionError, match=r"gone\.weight"):
        score_groups(model, [Group("g", "x", 2, (Member("gone.weight", 0, "out"),))], labels, sc.Magnitude())
    with pytest.raises(SecateurError, match="labels of g"):
        score_groups(model, [Group("g", "x", 2, (Member("0.weight", 0, "out"),))], labels, sc.Magnitude())
    with pytest.raises(SelectionError, match="meta device"):
        score_groups(mlp()[0].to("meta"), groups, labels, sc.Magnitude())
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(sc.NonFiniteError, match="first"):
        score_groups(model, groups, labels, sc.Magnitude())
