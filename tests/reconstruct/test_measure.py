"""Moments as modules hear them, against rows computed from the data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.collect import traffic
from secateur.collect.batches import as_batches
from secateur.core.errors import NonFiniteError, SecateurError, SelectionError, StatsError
from secateur.reconstruct import Moments, Tokens, consumers_of, cross_moments, masked_twin, moments
from secateur.reconstruct.order import order_of


def same(found: Moments, rows: Tensor) -> None:
    rows = rows.double()
    centred = rows - rows.mean(0)
    assert found.count == len(rows)
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, centred.T @ centred / len(rows))
    torch.testing.assert_close(found.gram, rows.T @ rows / len(rows))


def measured(model: nn.Module, names: list[str], batches: list, tokens: Tokens | None = None):
    consumers, reasons = consumers_of(model, names)
    assert not reasons
    return moments(model, consumers, batches, tokens)


class Twice(nn.Module):
    """One tensor for `a` and `b`, another for `c`, which comes first in registration."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(3, 4)
        self.unused = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) + self.b(input=x)))


def test_linear_layers_and_what_they_share(generator, monkeypatch):
    monkeypatch.setattr(traffic, "BLOCK", 10)  # several blocks a batch
    model, x = Twice(), torch.randn(11, 5, 3, generator=generator)
    names = [f"{n}.weight" for n in ("unused", "c", "a", "b")]
    found = measured(model, names, list(x.split(4)))
    same(found.moments["a.weight"], x.flatten(0, 1))
    same(found.moments["c.weight"], torch.relu(model.a(x) + model.b(x)).detach().flatten(0, 1))
    assert found.moments["a.weight"] is found.moments["b.weight"]
    assert found.reasons == {"unused.weight": "its module was never called on this data"}


def test_a_tensor_that_is_written_to_is_another_input(generator):
    class Writes(Twice):
        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            return self.c(first + self.b(x.mul_(2)))

    x = torch.randn(9, 3, generator=generator)
    found = measured(Writes(), ["a.weight", "b.weight"], [x.clone()])
    # The data itself is doubled by each pass.
    same(found.moments["a.weight"], 2 * x)
    same(found.moments["b.weight"], 4 * x)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (1, 3), padding="same", padding_mode="reflect", dilation=(1, 2)),
        nn.Conv1d(3, 4, 3),
    ],
)
def test_convolutions(generator, conv):
    x = torch.randn(5, 3, *([8] * len(conv.kernel_size)), generator=generator)
    found = measured(nn.Sequential(conv), ["0.weight"], list(x.split(2))).moments["0.weight"]
    with torch.no_grad():
        y = conv(x).movedim(1, -1).flatten(0, -2).double()
        weight = conv.weight.movedim(1, -1).flatten(1).double()
    # What a convolution gives has the moments that its weights make of those of the unfolded input.
    assert found.count == len(y)
    torch.testing.assert_close(weight @ found.mean + conv.bias, y.mean(0), check_dtype=False)
    torch.testing.assert_close(weight @ found.covariance @ weight.T, y.T.cov(correction=0))


def test_positions_are_a_seeded_sample(generator):
    x = torch.randn(6, 3, 16, 16, generator=generator)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    few = measured(model, ["0.weight"], list(x.split(4)), Tokens(positions=50)).moments["0.weight"]
    again = measured(model, ["0.weight"], list(x.split(4)), Tokens(positions=50)).moments["0.weight"]
    other = measured(model, ["0.weight"], list(x.split(4)), Tokens(positions=50, seed=1)).moments["0.weight"]
    whole = measured(model, ["0.weight"], [x], Tokens(positions=14 * 14)).moments["0.weight"]
    assert few.count == 6 * 50 and torch.equal(few.covariance, again.covariance)
    assert not torch.equal(few.covariance, other.covariance)
    same(whole, F.unfold(x, 3).view(6, 3, 9, -1).permute(0, 3, 2, 1).flatten(2).flatten(0, 1))
    torch.testing.assert_close(few.covariance, whole.covariance, atol=0.4, rtol=0)
    with pytest.raises(SecateurError, match="positions"):
        Tokens(positions=0)


def test_padding_is_left_out_where_a_mask_says_so(generator):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.flat, self.pooled = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.pooled(self.flat(self.tokens(x).flatten(0, 1)).view_as(x).mean(1))

    model, x = Masked(), torch.randn(4, 6, 3, generator=generator)
    mask = torch.rand(4, 6, generator=generator) > 0.4
    names = ["tokens.weight", "flat.weight", "pooled.weight"]
    found = measured(model, names, [{"x": x, "attention_mask": mask.long()}]).moments
    same(found["tokens.weight"], x[mask])
    same(found["flat.weight"], model.tokens(x)[mask].detach())
    assert found["pooled.weight"].count == 4
    assert measured(model, names, [{"x": x}]).moments["tokens.weight"].count == 24
    empty = measured(
        model, names, [{"x": x, "attention_mask": mask}, {"x": x, "attention_mask": mask & False}]
    )
    assert empty.moments["tokens.weight"].count == int(mask.sum())


def test_conv1d_and_tied_weights(generator):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(transformers.Conv1D(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3))
    model[3].weight, model[3].bias = model[2].weight, model[2].bias
    x = torch.randn(8, 3, generator=generator)
    (conv1d, tied), reasons = consumers_of(model, ["0.weight", "2.weight", "3.weight"])
    assert conv1d.input_dim == 0 and tied.input_dim == 1 and tied.holders == ("2", "3")
    assert reasons == {"3.weight": "the same tensor as 2.weight, which is repaired"}
    found = moments(model, [conv1d, tied], [x]).moments
    same(found["0.weight"], x)
    h = model[:2](x).detach()
    same(found["2.weight"], torch.cat([h, model[2](h).detach()]))


def test_tied_convolutions_unfold_each_in_its_own_way(generator):
    def tied(stride: int) -> nn.ModuleList:
        pair = nn.ModuleList([nn.Conv1d(2, 2, 3, stride=s) for s in (1, stride)])
        pair[1].weight, pair[1].bias = pair[0].weight, pair[0].bias
        return pair

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = tied(2), tied(4)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [conv(x) for conv in (*self.a, *self.b)]

    x = torch.randn(3, 2, 11, generator=generator)
    found = measured(Pairs(), ["a.0.weight", "b.0.weight"], [x]).moments
    assert [m.count for m in found.values()] == [3 * (9 + 5), 3 * (9 + 3)]


def test_what_cannot_be_reconstructed_has_a_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.zeros(2, 3, 3))
            self.depthwise, self.up = nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3)
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.head.weight = self.embedding.weight
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.one.weight = self.two.weight
            self.three, self.four = nn.Linear(3, 3), nn.Linear(3, 3)
            self.three.bias = self.four.bias

    names = ["experts", "depthwise.weight", "up.weight", "head.weight", "one.weight", "three.weight"]
    found, reasons = consumers_of(Odd(), names)
    assert found == () and list(reasons) == names
    expected = ["no hook sees", "grouped", "transposed", "tied to embedding.weight", "differ in their bias"]
    for part, reason in zip([*expected, "its bias is tied"], reasons.values(), strict=True):
        assert part in reason
    with pytest.raises(SelectionError, match=r"no parameter nothing\.weight"):
        consumers_of(Odd(), ["nothing.weight"])


def test_two_models_side_by_side(generator):
    model, x = Twice(), torch.randn(30, 3, generator=generator)
    keep = torch.tensor([True, True, False, True])
    slices = {("a.weight", 0): keep, ("a.bias", 0): keep, ("b.weight", 0): keep, ("b.bias", 0): keep}
    twin = masked_twin(model, slices)
    consumers, _ = consumers_of(model, ["c.weight", "a.weight"])
    found = cross_moments(model, twin, consumers, list(x.split(7)))
    dense, pruned = (torch.relu(m.a(x) + m.b(x)).detach() for m in (model, twin))
    assert not pruned[:, 2].any() and dense[:, 2].any()
    both = found.moments["c.weight"]
    same(both.dense, dense)
    same(both.pruned, pruned)
    cross = (dense - dense.mean(0)).T @ (pruned - pruned.mean(0)) / 30
    torch.testing.assert_close(both.cross, cross.double(), atol=1e-6, rtol=1e-5)
    same(found.moments["a.weight"].pruned, x)


def test_inputs_written_to_after_the_call_are_those_of_the_call(generator):
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.b(h)
            return y + h.zero_()

    model, x = Overwrites(), torch.randn(8, 3, generator=generator)
    consumers, _ = consumers_of(model, ["b.weight"])
    both = cross_moments(model, copy.deepcopy(model), consumers, [x]).moments["b.weight"]
    same(both.dense, model.a(x).detach())
    torch.testing.assert_close(both.cross, both.dense.covariance)


class Routed(nn.Module):
    """Two experts, each of which sees the tokens that a router gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.one, self.two, self.last = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        chosen = h[:, 0] > 0
        out = torch.zeros_like(h)
        out[chosen] = self.one(h[chosen])
        if not bool(chosen.all()):
            out[~chosen] = self.two(h[~chosen])
        return self.last(out)


def test_experts_that_get_other_tokens_are_left_out(generator):
    model, x = Routed(), torch.randn(40, 3, generator=generator)
    twin = masked_twin(model, {("lift.weight", 1): torch.tensor([True, False, False])})
    consumers, _ = consumers_of(model, ["one.weight", "two.weight", "last.weight"])
    found = cross_moments(model, twin, consumers, [x])
    assert list(found.moments) == ["last.weight"]
    assert all("other shapes" in reason for reason in found.reasons.values()) and len(found.reasons) == 2


def test_a_layer_that_a_later_batch_calls_first_has_its_place_in_the_order():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.end, self.extra, self.start = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            return self.end(self.extra(h) if len(x) > 1 else h)

    model = Sometimes()
    consumers, _ = consumers_of(model, ["end.weight", "extra.weight", "start.weight"])
    data = as_batches([torch.ones(1, 3), torch.ones(2, 3)], torch.device("cpu"), "")
    stages = order_of(model, consumers, data).stages
    assert [[c.name for c in stage] for stage in stages] == [
        ["start.weight"],
        ["extra.weight"],
        ["end.weight"],
    ]


def test_the_model_is_left_as_it_was(generator):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    measured(model, ["0.weight", "3.weight"], [torch.randn(8, 3, generator=generator)])
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_data_is_refused(generator):
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(StatsError, match="empty"):
        measured(model, ["0.weight"], [])
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        measured(model, ["0.weight"], [torch.full((2, 3), torch.nan)])


def test_sharing_that_does_not_last_is_refused(generator):
    class Fickle(Twice):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.c(self.a(x) + self.b(x if self.calls == 1 else 2 * x))

    with pytest.raises(StatsError, match=r"a\.weight and b\.weight"):
        measured(Fickle(), ["a.weight", "b.weight"], [torch.randn(5, 3, generator=generator)])
