"""Small modules that try to fool the types: exact, marked inexact, or frozen, and never silently wrong.

`prove` compares every exact group with the masked twin and every group with a permutation. What is listed
besides must come out: "exact" (a group can be cut, and exactly), "inexact" (it can, and says that it is not
zeroing), "frozen" (nothing of the layer can be cut).
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph import Graph
from tests.graph.prove import Module, prove

N = 8


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def two(function, out=N, **parts):
    """A linear layer, a function, a linear layer."""
    return Module(lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(3, N), b=nn.Linear(out, 2), **parts)


def loop_over_heads(m, x):
    x = x.view(x.shape[0], 4, 2)
    return torch.stack([x[:, h] * (h + 1) for h in range(4)], 1).flatten(1)


def written_in_place(m, x):
    x = x.clone()
    x[:, 2:4] = 0
    return x


def half_added(m, x):
    x = x.clone()
    x[:, : N // 2] += x[:, N // 2 :]
    return x


def through_numbers(m, x):
    return x * x.shape[-1]


def weighted_by_position(m, x):
    return x * torch.linspace(0, 1, N, dtype=x.dtype)


CASES = {
    # Plain passages, all exact.
    "identity": (lambda m, x: x, "exact"),
    "relu": (lambda m, x: x.relu(), "exact"),
    "square": (lambda m, x: x * x, "exact"),
    "doubled by adding": (lambda m, x: x + x, "exact"),
    "tanh of a half": (lambda m, x: (x / 2).tanh(), "exact"),
    "sigmoid": (lambda m, x: x.sigmoid(), "exact"),
    "exp": (lambda m, x: x.exp(), "exact"),
    "plus one": (lambda m, x: x + 1, "exact"),
    "cosine": (lambda m, x: x.cos(), "exact"),
    "where": (lambda m, x: torch.where(x > 0, x, x.neg() * 0.1), "exact"),
    "masked fill": (lambda m, x: x.masked_fill(x < 0, 3.0), "exact"),
    "clamp above zero": (lambda m, x: x.clamp(min=0.5), "exact"),
    "sum of squares": (lambda m, x: x / (x.square().sum(-1, keepdim=True) + 1).sqrt(), "exact"),
    "vector norm": (lambda m, x: F.normalize(x, dim=-1), "exact"),
    "two dimensions": (lambda m, x: x.unflatten(-1, (-1, 2)).flatten(-2), None),
    "transposed twice": (lambda m, x: x.t().contiguous().t(), "exact"),
    "self product": (lambda m, x: torch.einsum("bi,bi,bj->bj", x, x, x), "exact"),
    "sum of it": (lambda m, x: x * x.sum(-1, keepdim=True), "exact"),
    "buffer": (lambda m, x: x * m.w, "exact", {"w": torch.rand(N, dtype=torch.float64)}),
    "outer product with itself": (lambda m, x: (x[:, :, None] * x[:, None]).sum(1), "inexact"),
    "cumsum of cumsum": (lambda m, x: x.cumsum(-1).cumsum(-1), "frozen"),
    "cumsum": (lambda m, x: x.cumsum(-1), "frozen"),
    # The count of positions enters.
    "mean": (lambda m, x: x - x.mean(-1, keepdim=True), "inexact"),
    "centred variance": (lambda m, x: x / x.var(-1, keepdim=True), "inexact"),
    "softmax": (lambda m, x: x.softmax(-1), "inexact"),
    "log softmax": (lambda m, x: x.log_softmax(-1), "inexact"),
    "logsumexp": (lambda m, x: x - x.logsumexp(-1, keepdim=True), "inexact"),
    "exp summed": (lambda m, x: x * x.exp().sum(-1, keepdim=True), "inexact"),
    "cosine summed": (lambda m, x: x * x.cos().sum(-1, keepdim=True), "inexact"),
    "one added, summed": (lambda m, x: x * (x + 1).sum(-1, keepdim=True), "inexact"),
    "sigmoid against a vector": (
        lambda m, x: x * (x.sigmoid() @ m.w)[:, None],
        None,
        {"w": torch.rand(N, dtype=torch.float64)},
    ),
    "product over it": (lambda m, x: x * (x + 2).prod(-1, keepdim=True), "inexact"),
    "largest": (lambda m, x: x - x.amax(-1, keepdim=True), "inexact"),
    "smallest": (lambda m, x: x - x.min(-1, keepdim=True).values, "inexact"),
    "median": (lambda m, x: x - x.median(-1, keepdim=True).values, "inexact"),
    "standard deviation": (lambda m, x: x / (1 + x.std(-1, keepdim=True)), "inexact"),
    "layer norm": (lambda m, x: F.layer_norm(x, x.shape[-1:]), "inexact"),
    "rms norm by hand": (lambda m, x: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(), "inexact"),
    "divided by the size": (lambda m, x: x / x.shape[-1], "frozen"),
    "multiplied by the size": (through_numbers, "frozen"),
    "size as a power": (lambda m, x: x * x.shape[-1] ** -0.5, None),
    "size as a fill": (lambda m, x: x + torch.full_like(x, x.shape[-1]), None),
    "size in a tensor": (lambda m, x: x * torch.tensor(x.shape[-1]), None),
    "size compared": (lambda m, x: x * 2 if x.shape[-1] > 5 else x, None),
    "size in range": (lambda m, x: sum(x * i for i in range(x.shape[-1])), "frozen"),
    "size of numel": (lambda m, x: x / (x.numel() // x.shape[0]), None),
    "size by int": (lambda m, x: x * int(x.shape[-1]), "frozen"),
    "size by a root": (lambda m, x: x / math.sqrt(x.shape[-1]), "frozen"),
    "size by a whole root": (lambda m, x: x / math.isqrt(x.shape[-1]), "frozen"),
    "size by a logarithm": (lambda m, x: x * math.log(x.shape[-1]), "frozen"),
    "size by numpy": (lambda m, x: x * float(np.sqrt(x.shape[-1])), "frozen"),
    "counted": (lambda m, x: x * (x > -1).sum(-1, keepdim=True), "inexact"),
    "counted zeros": (lambda m, x: x * (x == 0).sum(-1, keepdim=True), "inexact"),
    "counted not zero": (lambda m, x: x * torch.count_nonzero(x, -1)[:, None], "exact"),
    "all of it": (lambda m, x: x * (x > -1).all(-1, keepdim=True), "inexact"),
    "l0 distance": (lambda m, x: x * torch.cdist(x, x.flip(0)).mean(-1, keepdim=True), "exact"),
    # Places matter.
    "flip": (lambda m, x: x.flip(-1), "frozen"),
    "flip added": (lambda m, x: x + x.flip(-1), "frozen"),
    "roll": (lambda m, x: x.roll(1, -1), "frozen"),
    "cumprod": (lambda m, x: x.cumprod(-1), "frozen"),
    "cummax": (lambda m, x: x.cummax(-1).values, "frozen"),
    "sort": (lambda m, x: x.sort(-1).values, "frozen"),
    "sorted by argsort": (lambda m, x: x.gather(-1, x.argsort(-1)), "frozen"),
    "position weights": (weighted_by_position, "frozen"),
    "arange added": (lambda m, x: x + torch.arange(N), "frozen"),
    "arange of its size": (lambda m, x: x + torch.arange(x.shape[-1]), "frozen"),
    "one pinned": (lambda m, x: x * x[:, 3:4], None),
    "first pinned": (lambda m, x: x * x[:, :1], None),
    "last pinned": (lambda m, x: x * x[:, -1:], None),
    "picked by number": (lambda m, x: x * x[:, 2][:, None], None),
    # The outputs of a permutation can be cut with its entries, its inputs cannot.
    "permuted by a buffer": (lambda m, x: x[:, m.p], "exact", {"p": torch.randperm(N)}),
    "permuted by a list": (lambda m, x: x[:, [1, 0, 2, 3, 7, 6, 5, 4]], "frozen"),
    "gathered": (lambda m, x: x.gather(1, m.p.expand(x.shape[0], -1)), "exact", {"p": torch.randperm(N)}),
    "difference of neighbours": (lambda m, x: F.pad(x.diff(dim=-1), (0, 1)), None),
    "shifted slice": (lambda m, x: F.pad(x[:, 1:], (0, 1)), None),
    "halves swapped": (lambda m, x: torch.cat((x[:, N // 2 :], x[:, : N // 2]), 1), None),
    "even and odd": (lambda m, x: torch.cat((x[:, ::2], x[:, 1::2]), 1), None),
    "every third": (lambda m, x: torch.cat((x[:, ::3], x[:, :5]), 1), None),
    "reverse by transposing": (lambda m, x: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, N), None),
    "maxout": (lambda m, x: x.view(-1, 4, 2).amax(-1).repeat(1, 2), None),
    "maxout of parts": (lambda m, x: torch.maximum(x[:, :4], x[:, 4:]).repeat(1, 2), None),
    "reflected": (lambda m, x: F.pad(x, (1, 1), mode="reflect")[:, 1:-1], "frozen"),
    "windows": (lambda m, x: x.unfold(1, 2, 2).sum(-1).repeat(1, 2), "frozen"),
    "pooled along it": (lambda m, x: F.avg_pool1d(x[:, None], 2)[:, 0].repeat(1, 2), "frozen"),
    "convolved along it": (
        lambda m, x: m.c(x[:, None])[:, 0],
        "frozen",
        {"c": nn.Conv1d(1, 1, 3, padding=1)},
    ),
    "interpolated along it": (lambda m, x: F.interpolate(x[:, None], N, mode="linear")[:, 0], "frozen"),
    "Fourier": (lambda m, x: torch.fft.fft(x).real, "frozen"),
    "diagonal": (lambda m, x: (x[:, :, None] * x[:, None]).diagonal(dim1=1, dim2=2), "frozen"),
    "upper triangle": (lambda m, x: (x[:, :, None] * x[:, None]).triu().sum(1), "frozen"),
    "as a list": (lambda m, x: x * torch.tensor(x[0].tolist()).sum(), "frozen"),
    "unbound": (lambda m, x: torch.stack([v * (i + 1) for i, v in enumerate(x.unbind(1))], 1), "frozen"),
    "loop over heads": (loop_over_heads, None),
    "hard-coded view": (lambda m, x: x.view(-1, 2, 4).flatten(1), None),
    "hard-coded split": (lambda m, x: torch.cat(x.split([3, 5], 1)[::-1], 1), None),
    "written in place": (written_in_place, None),
    "half added in place": (half_added, None),
    "kron": (lambda m, x: torch.kron(x, torch.ones(1, 2, dtype=x.dtype)), None, {}, 2 * N),
    "repeated": (lambda m, x: x.repeat(1, 2), "exact", {}, 2 * N),
    "interleaved": (lambda m, x: x.repeat_interleave(2, 1), "exact", {}, 2 * N),
    "beside itself": (lambda m, x: torch.cat((x, x.relu()), 1), "exact", {}, 2 * N),
    "all pairs": (lambda m, x: (x[:, :, None] * x[:, None]).flatten(1), None, {}, N * N),
    "pairs of pairs": (lambda m, x: (x[:, :, None] * x[:, None]).transpose(1, 2).flatten(1), None, {}, N * N),
    "padded by ones": (lambda m, x: F.pad(x, (1, 2), value=1.0), "exact", {}, N + 3),
    "scattered": (
        lambda m, x: torch.zeros_like(x).scatter(1, m.p.expand(x.shape[0], -1), x),
        "frozen",
        {"p": torch.randperm(N)},
    ),
    # Choices by size.
    "top values": (lambda m, x: x * x.topk(2, -1).values.sum(-1, keepdim=True), "inexact"),
    "top mask": (lambda m, x: x * (x >= x.topk(3, -1).values[:, -1:]), "inexact"),
    "argmax as a number": (lambda m, x: x * x.argmax(-1, keepdim=True), "frozen"),
    "argmax as an index": (lambda m, x: x * x.gather(1, x.argmax(-1, keepdim=True)), "inexact"),
    "argmax as one-hot": (lambda m, x: x * F.one_hot(x.argmax(-1), N), None),
    "argmax modulo": (lambda m, x: x * (x.argmax(-1, keepdim=True) % 2), "frozen"),
    "kept by a mask": (lambda m, x: x[:, m.k].repeat(1, 2), "frozen", {"k": torch.arange(N) % 2 == 0}),
    "searched": (lambda m, x: x * torch.bucketize(x, m.k), None, {"k": torch.linspace(-1, 1, 5).double()}),
    "matrix power": (lambda m, x: x @ torch.linalg.inv(torch.eye(N, dtype=x.dtype) + 0.01), None),
    "histogram": (lambda m, x: x * torch.histc(x, 4)[0], None),
}


@pytest.mark.parametrize("name", CASES)
def test_never_silently_wrong(name):
    function, expected, *rest = CASES[name]
    parts = rest[0] if rest else {}
    model = two(function, rest[1] if len(rest) > 1 else N, **parts)
    graph = prove(model, randn(6, 3), power=False)
    groups = graph.groups()
    if expected == "frozen":
        assert not groups, groups
        assert all(row.reason for row in graph.frozen())
    elif expected is not None:
        assert groups and all(g.exact == (expected == "exact") for g in groups), (
            str(graph),
            [g.inexact for g in groups],
        )


def test_there_are_many():
    assert len(CASES) >= 100


class OneLineTwice(nn.Module):
    """A line that runs with two numbers: read from the tensor, the second would be wrong for the first."""

    def __init__(self, *numbers):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.numbers = [(n,) for n in numbers]

    def forward(self, x):
        x = self.first(x)
        for (n,) in self.numbers:
            x = x.reshape(x.shape[0], n, x.shape[1] // n).transpose(1, 2).reshape(x.shape)
        return self.last(x)


def test_a_call_that_runs_twice_is_edited_only_as_both_allow():
    assert len(prove(OneLineTwice(2), randn(5, 3)).groups()) > 0
    assert not prove(OneLineTwice(2, 4), randn(5, 3)).groups()


class OverWindows(nn.Module):
    """Fused attention in each of several windows at once: five dimensions."""

    def __init__(self, rank):
        super().__init__()
        self.qkv, self.out = nn.Linear(N, 24), nn.Linear(N, 2)
        self.heads, self.rank = 2, rank

    def forward(self, x):
        b, w, n, c = x.shape
        if self.rank == 4:
            x = x.flatten(0, 1)
            qkv = self.qkv(x).reshape(b * w, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        else:
            qkv = self.qkv(x).reshape(b, w, n, 3, self.heads, c // self.heads).permute(3, 0, 4, 1, 2, 5)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        y = y.permute(0, 2, 1, 3) if self.rank == 4 else y.permute(0, 2, 3, 1, 4)
        return self.out(y.reshape(b, w, n, c))


@pytest.mark.parametrize("rank", [4, 5])
def test_the_default_scale_of_attention_is_kept_in_every_rank(rank):
    graph = prove(OverWindows(rank), randn(3, 2, 5, N))
    found = {g.kind: g for g in graph.groups()}
    assert found.keys() == {"heads", "head_dim"}
    assert found["heads"].exact and found["head_dim"].exact  # since the trained scale is kept


class Remembers(nn.Module):
    """Writes what it computed into a small buffer, and asks the buffer which way to go."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(N, 12), nn.Linear(12, 2)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        y = self.up(x)
        self.seen.copy_(y.square().sum()[None])
        return self.down(torch.relu(y)) if self.seen.item() > 0 else x[..., :2]


def test_a_buffer_that_was_written_to_has_no_values_of_before():
    model = Remembers()
    graph = Graph.trace(model.double(), randn(3, N))
    assert graph.traced.engine == "real" and "reads values" in graph.notes[0]
    assert [g.kind for g in graph.groups()] == ["neurons"]  # of the way that it really goes
    assert float(model.seen) == 0.0
