"""Attention that leaves its scale to the size of a head: cutting that size keeps the trained scale."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from secateur.core.errors import ArtifactError
from secateur.graph import Graph
from secateur.surgery import Cuts, Surgery, replay_
from tests.graph.prove import chosen, prove, redrawn, run

N = 8


def heads_of(linear, x, n):
    return linear(x).unflatten(-1, (n, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of two heads; subclasses say how it is called."""

    def __init__(self, n=2):
        super().__init__()
        self.n = n
        self.q, self.k, self.v, self.out = (nn.Linear(N, N) for _ in range(4))

    def forward(self, x):
        q, k, v = (heads_of(p, x, self.n) for p in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Dotted(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)


class Imported(Attention):
    def attend(self, q, k, v):
        return scaled_dot_product_attention(q, k, value=v)


class Starred(Attention):
    def attend(self, *qkv):
        return F.scaled_dot_product_attention(*qkv)


class Unnamed(Attention):
    def attend(this, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, False) + 0 * F.relu(
            F.scaled_dot_product_attention(q, k, v)
        )


def free(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Free(Attention):
    def attend(self, q, k, v):
        return free(q, k, v)


class Rebound(Attention):
    def attend(self, q, k, v):
        self = self
        return F.scaled_dot_product_attention(q, k, v)


class Inside(Attention):
    def attend(self, q, k, v):
        return (lambda: F.scaled_dot_product_attention(q, k, v))()


class Settings(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **{"scale": None})


class Static(Attention):
    @staticmethod
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Given(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def example():
    return torch.randn(2, 5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head_dims(graph):
    return [g for g in graph.groups() if any(m.tensor.endswith("k.weight") for m in g.members if m.dim == 0)]


def queries(graph):
    """Groups of the query's rows that are no heads."""
    return [g for g in head_dims(graph) if g.kind != "heads"]


@pytest.mark.parametrize("kind", [Dotted, Imported, Starred, Unnamed, Given])
def test_the_cut_equals_the_masked_twin(kind):
    (group,) = queries(prove(kind(), example()))
    assert group.exact


@pytest.mark.parametrize("kind", [Free, Rebound, Inside, Settings, Static])
def test_where_no_module_can_keep_the_scale_the_cut_is_not_exact(kind):
    (group,) = queries(prove(kind(), example()))
    assert "default scale of attention" in group.inexact[0]


class Twice(nn.Module):
    """Two calls with heads of two sizes, or one call that runs with both."""

    def __init__(self, apart):
        super().__init__()
        self.a, self.b, self.apart = Dotted(2), Dotted(4), apart

    def both(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        for part in (self.a, self.b):
            q, k, v = (heads_of(p, x, part.n) for p in (part.q, part.k, part.v))
            if self.apart and part is self.b:
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = self.both(q, k, v)
            x = x + part.out(y.transpose(1, 2).flatten(2))
        return x


def test_two_calls_of_one_module_keep_two_scales():
    found = queries(prove(Twice(True), example()))
    assert len(found) == 2 and all(g.exact for g in found)


def test_one_call_with_two_scales_keeps_neither():
    found = queries(prove(Twice(False), example()))
    assert len(found) == 2 and not any(g.exact for g in found)


def cut(model, seed=0):
    graph = Graph.trace(model, example())
    (group,) = queries(graph)
    return Surgery(chosen((group,), seed))


def test_it_is_replayed_undone_and_touches_no_other_model():
    model, other, fresh = (redrawn(Dotted().double()) for _ in range(3))
    plain = run(other, (example(),), {})
    attributes = set(vars(model))
    surgery = cut(model)
    plan = surgery.plan()
    assert any("the trained scale is given instead" in note for note in plan.notes)
    applied = surgery.apply_(model)
    small = run(model, (example(),), {})
    assert not torch.equal(small[0], plain[0])
    assert torch.equal(run(other, (example(),), {})[0], plain[0])  # of the same class, not cut

    again = replay_(fresh, json.loads(json.dumps({"format": 1, "cuts": [plan.cuts.to_dict()]})))
    assert torch.equal(run(fresh, (example(),), {})[0], small[0])
    again.undo()
    applied.undo()
    assert set(vars(model)) == attributes
    assert torch.equal(run(model, (example(),), {})[0], plain[0])


def test_a_second_cut_keeps_the_first_scale():
    model = redrawn(Dotted().double())
    cut(model).apply_(model)  # 4 -> 2 of each head
    dense = copy.deepcopy(model)
    surgery = cut(model, seed=1)  # 2 -> 1
    (group,) = surgery
    twin = group.home.graph.masked_twin(surgery)
    surgery.apply_(model)
    assert model.q.weight.shape[0] == 2
    found, expected = run(model, (example(),), {})[0], run(twin, (example(),), {})[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, run(dense, (example(),), {})[0])


def test_the_cut_model_is_exported():
    model = redrawn(Dotted().double()).eval()
    cut(model).apply_(model)
    exported = torch.export.export(model, (example(),)).module()
    torch.testing.assert_close(exported(example()), model(example()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "entry", [["", "forward", 0.5], ["", "_secateur_scale_1", "0.5"], ["", "__class__", 0.5]]
)
def test_a_file_sets_nothing_but_scales(entry):
    data = cut(Dotted().double()).plan().cuts.to_dict()
    with pytest.raises(ArtifactError):
        Cuts.from_dict(data | {"kept_scales": [entry]})
