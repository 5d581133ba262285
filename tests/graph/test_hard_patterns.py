"""Patterns of real models that pruners get wrong: each one can be cut, or says why not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph.prove import Module, holding, kinds, prove, reasons, sizes

DOUBLE = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


# Layouts of images -----------------------------------------------------------------------------------


class Flattened(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        return self.fc(self.conv(x).relu().permute(self.order).flatten(1))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 2, 1, 3)], ids=["NCHW", "NHWC", "NHCW"])
def test_flatten_in_any_layout(order):
    graph = prove(Flattened(order), randn(2, 3, 4, 4))
    (filters,) = holding(graph, "conv.weight", 0)
    assert filters.kind == "filters" and filters.exact and holding(graph, "fc.weight", 1) == [filters]


class Shuffle(nn.Module):
    def __init__(self, how, groups=3):
        super().__init__()
        self.how, self.groups = how, groups
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=groups)
        self.module = nn.ChannelShuffle(groups)
        self.c = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.b(self.a(x))
        if self.how == "module":
            x = self.module(x)
        elif self.how == "functional":
            x = F.channel_shuffle(x, self.groups)
        else:
            n, c, h, w = x.shape
            x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c(x)


@pytest.mark.parametrize("how", ["module", "functional", "views"])
def test_channel_shuffle(how):
    graph = prove(Shuffle(how), randn(2, 3, 4, 4))
    assert holding(graph, "b.weight", 0) and holding(graph, "b.weight", 1)
    assert set(sizes(graph, "c.weight", 1)) <= {3, 4} and sizes(graph, "c.weight", 1)


def test_shufflenet_unit():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            a, b = self.stem(x).chunk(2, dim=1)
            x = torch.cat((a, self.conv(b).relu()), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
            return self.out(x)

    graph = prove(Unit(), randn(2, 3, 4, 4))
    assert sizes(graph, "conv.weight", 1) == [8]


def test_flip_and_roll_of_channels_freeze():
    for op, word in ((lambda x: x.flip(1), "flipped"), (lambda x: x.roll(1, 1), "rolled")):
        model = Module(lambda m, x, op=op: m.b(op(m.a(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
        graph = prove(model, randn(2, 3, 4, 4))
        assert (
            word in reasons(graph, "a.weight", 0)[0]
            and "test_hard_patterns.py" in reasons(graph, "a.weight", 0)[0]
        )


def test_flip_of_pixels_does_not():
    model = Module(lambda m, x: m.b(m.a(x).flip(-1).roll(1, 2)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    assert kinds(prove(model, randn(2, 3, 4, 4))) == ["filters"]


def test_pad_of_channels():
    model = Module(
        lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 2, 3))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(13, 4, 1)
    )
    graph = prove(model, randn(2, 3, 4, 4))
    assert sizes(graph, "b.weight", 1) == [8] and holding(graph, "a.weight", 0)[0].exact


class OptionA(nn.Module):
    """The shortcut without parameters of the CIFAR networks of He et al. 2016: strided, padded by zeros."""

    def __init__(self, planes=8):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.norm = nn.Conv2d(4, planes, 3, 2, 1), nn.BatchNorm2d(planes)
        self.b = nn.Conv2d(planes, planes, 3, 1, 1)
        self.pad = planes // 4
        self.fc = nn.Linear(planes, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad), "constant", 0)
        return self.fc((shortcut + self.b(self.norm(self.a(x)).relu())).relu().mean((2, 3)))


def test_option_a_shortcut():
    graph = prove(OptionA(), randn(2, 3, 6, 6))
    assert sizes(graph, "a.weight", 0) == [8]
    assert sizes(graph, "stem.weight", 0) == [4] and 4 in sizes(graph, "b.weight", 0)


@pytest.mark.parametrize("up", [True, False])
def test_pixel_shuffle(up):
    first, last = (
        (nn.Conv2d(3, 16, 1), nn.Conv2d(4, 5, 1)) if up else (nn.Conv2d(3, 4, 1), nn.Conv2d(16, 5, 1))
    )
    model = nn.Sequential(first, nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2), last)
    graph = prove(model, randn(2, 3, 4, 4))
    assert sizes(graph, "2.weight", 1) == [4] and holding(graph, "0.weight", 0)[0].exact


def test_pixel_shuffle_by_views():
    def forward(m, x):
        x = m.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2)
        return m.b(x)

    graph = prove(Module(forward, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(4, 5, 1)), randn(2, 3, 4, 4))
    assert sizes(graph, "b.weight", 1) == [4]


class PatchMerging(nn.Module):
    """As in Swin: four neighbours of an NHWC image side by side."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 5, bias=False)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduce(self.norm(x))


def test_patch_merging():
    graph = prove(PatchMerging(), randn(2, 3, 4, 4))
    (width,) = holding(graph, "stem.weight", 0)
    assert (
        width in holding(graph, "reduce.weight", 1) and not width.exact and "normalised" in width.inexact[0]
    )


def test_token_mixing():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.down, self.up = nn.Linear(5, 7), nn.Linear(7, 5)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x)
            x = x + self.up(F.gelu(self.down(x.transpose(1, 2)))).transpose(1, 2)
            return self.fc(x.mean(1))

    graph = prove(Mixer(), randn(2, 5, 3))
    assert sizes(graph, "down.weight", 0) == [7] and sizes(graph, "embed.weight", 0) == [8]
    assert not holding(graph, "down.weight", 1)


# Gates and products ----------------------------------------------------------------------------------


def test_glu():
    graph = prove(nn.Sequential(nn.Linear(3, 16), nn.GLU(), nn.Linear(8, 4)), randn(2, 3))
    (neurons,) = graph.groups()
    assert neurons.size == 8 and neurons.exact


@pytest.mark.parametrize("how", ["chunk", "split", "slices", "attribute"])
def test_chunk_gating(how):
    def forward(m, x):
        x = m.a(x)
        if how == "chunk":
            value, gate = x.chunk(2, dim=-1)
        elif how == "split":
            value, gate = x.split(x.shape[-1] // 2, dim=-1)
        elif how == "slices":
            half = x.shape[-1] // 2
            value, gate = x[..., :half], x[..., half:]
        else:
            value, gate = x.split([m.inner, m.inner], dim=-1)
        return m.b(value * F.silu(gate))

    graph = prove(Module(forward, a=nn.Linear(3, 16), b=nn.Linear(8, 4), inner=8), randn(2, 3))
    assert sizes(graph, "a.weight", 0) == [8] and graph.groups()[0].exact


def test_einsum_with_raw_parameters():
    model = Module(
        lambda m, x: torch.einsum("bthd,hdo->bto", torch.einsum("bti,ihd->bthd", x, m.a).relu(), m.b),
        a=nn.Parameter(torch.empty(3, 4, 6)),
        b=nn.Parameter(torch.empty(4, 6, 5)),
    )
    graph = prove(model, randn(2, 7, 3))
    assert (
        sizes(graph, "a", 1) == [4] and sizes(graph, "a", 2) == [6] and all(g.exact for g in graph.groups())
    )


def test_functional_linear_with_raw_parameters():
    model = Module(
        lambda m, x: F.linear(F.linear(x, m.a, m.bias).tanh(), m.b) @ m.c,
        a=nn.Parameter(torch.empty(8, 3)),
        bias=nn.Parameter(torch.empty(8)),
        b=nn.Parameter(torch.empty(6, 8)),
        c=nn.Parameter(torch.empty(6, 2)),
    )
    graph = prove(model, randn(2, 3))
    assert sorted(g.size for g in graph.groups()) == [6, 8]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolution(groups):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ConvTranspose2d(8, 12, 2, stride=2, groups=groups),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )
    graph = prove(model, randn(2, 3, 4, 4))
    assert holding(graph, "1.weight", 0) and holding(graph, "1.weight", 1)
    assert sum(g.kind == "groups" for g in graph.groups()) == (groups > 1)


def test_depthwise_with_multiplier():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.Conv2d(12, 4, 1))
    graph = prove(model, randn(2, 3, 4, 4))
    assert sizes(graph, "0.weight", 0) == [6] and sizes(graph, "1.weight", 0) == [2, 6]


def test_depthwise_transposed():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 6, 2, 2, groups=6), nn.Conv2d(6, 4, 1))
    assert sizes(prove(model, randn(2, 3, 4, 4)), "0.weight", 0) == [6]


# Attention -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Fused queries, keys and values in every layout that models use."""

    def __init__(self, layout, heads=4, dim=6, width=8, kv=2):
        super().__init__()
        self.layout, self.heads, self.dim, self.kv = layout, heads, dim, kv
        rows = (heads + 2 * kv) * dim if layout == "grouped" else 3 * heads * dim
        self.embed, self.qkv, self.out = (
            nn.Linear(3, width),
            nn.Linear(width, rows),
            nn.Linear(heads * dim, width),
        )
        self.head = nn.Linear(width, 2)
        self.scale = dim**-0.5

    def split(self, x):
        b, t, _ = x.shape
        x = self.qkv(x)
        if self.layout == "3hd":
            return x.reshape(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "h3d":
            return (
                s.squeeze(3).transpose(1, 2) for s in x.view(b, t, self.heads, 3, self.dim).split(1, dim=3)
            )
        if self.layout == "hd3":
            return x.view(b, t, self.heads, self.dim, 3).permute(4, 0, 2, 1, 3).unbind(0)
        if self.layout == "chunk":
            return (s.view(b, t, self.heads, self.dim).transpose(1, 2) for s in x.chunk(3, dim=-1))
        if self.layout == "last3":  # views with a split of the last dimension, as BLOOM does
            x = x.view(b, t, self.heads, 3, self.dim)
            return (x[..., i, :].transpose(1, 2) for i in range(3))
        x = x.view(b, t, self.kv, self.heads // self.kv + 2, self.dim)
        q, k, v = x[:, :, :, :-2], x[:, :, :, [-2]], x[:, :, :, [-1]]
        k, v = (s.expand_as(q).flatten(2, 3).transpose(1, 2) for s in (k, v))
        return q.flatten(2, 3).transpose(1, 2), k, v

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.split(x)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.head(x + self.out((weights @ v).transpose(1, 2).reshape(b, t, -1)))


@pytest.mark.parametrize("layout", ["3hd", "h3d", "hd3", "chunk", "last3"])
def test_fused_attention(layout):
    graph = prove(Attention(layout), randn(2, 5, 3))
    assert {"heads", "head_dim"} <= set(kinds(graph)), str(graph)
    assert all(g.exact for g in graph.groups()), [g.inexact for g in graph.groups()]
    (heads,) = graph.groups("heads")
    assert heads.size == 4 and len([m for m in heads.members if m.tensor == "qkv.weight"]) >= 1


def test_grouped_queries_fused():
    graph = prove(Attention("grouped"), randn(2, 5, 3))
    assert sizes(graph, "out.weight", 1), graph.explain("qkv.weight") + str(graph)


@pytest.mark.parametrize("how", ["expand", "repeat_interleave", "sdpa"])
def test_grouped_queries(how):
    class GQA(nn.Module):
        def __init__(self, width=8, heads=6, kv=2, dim=4):
            super().__init__()
            self.heads, self.kv, self.head_dim = heads, kv, dim
            self.q, self.k = nn.Linear(3, heads * dim), nn.Linear(3, kv * dim)
            self.v, self.o = nn.Linear(3, kv * dim), nn.Linear(heads * dim, width)
            self.fc = nn.Linear(width, 2)

        def forward(self, x):
            b, t, _ = x.shape
            q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            k = self.k(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            v = self.v(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            rep = self.heads // self.kv
            if how == "expand":
                k, v = (
                    s[:, :, None]
                    .expand(b, s.shape[1], rep, t, self.head_dim)
                    .reshape(b, -1, t, self.head_dim)
                    for s in (k, v)
                )
            elif how == "repeat_interleave":
                k, v = k.repeat_interleave(rep, dim=1), v.repeat_interleave(rep, dim=1)
            if how == "sdpa":
                x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
            else:
                x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
            return self.fc(self.o(x.transpose(1, 2).reshape(b, t, -1)))

    graph = prove(GQA(), randn(2, 5, 3))
    assert {"kv_groups", "queries"} <= set(kinds(graph)), str(graph)
    assert sizes(graph, "k.weight", 0)[-1] == 4 and all(g.exact for g in graph.groups())


def rotate(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_rotary(pairs):
    class Rotary(nn.Module):
        def __init__(self, heads=2, dim=8):
            super().__init__()
            self.heads, self.dim = heads, dim
            self.q, self.k, self.v = (nn.Linear(3, heads * dim) for _ in range(3))
            self.o = nn.Linear(heads * dim, 5)
            self.register_buffer("frequencies", 10.0 ** -(torch.arange(0, dim, 2) / dim), persistent=False)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (
                f(x).view(b, t, self.heads, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            angles = torch.arange(t, dtype=x.dtype)[:, None] * self.frequencies
            if pairs == "halves":
                angles = torch.cat((angles, angles), dim=-1)
                q, k = (s * angles.cos() + rotate(s) * angles.sin() for s in (q, k))
            else:
                angles = angles.repeat_interleave(2, dim=-1)

                def turned(s):
                    return torch.stack((-s[..., 1::2], s[..., ::2]), dim=-1).flatten(-2)

                q, k = (s * angles.cos() + turned(s) * angles.sin() for s in (q, k))
            x = ((q @ k.transpose(-2, -1)) * 0.4).softmax(-1) @ v
            return self.o(x.transpose(1, 2).reshape(b, t, -1))

    graph = prove(Rotary(), randn(2, 5, 3))
    assert sizes(graph, "frequencies", 0) == [4], graph.explain("frequencies") + graph.explain("q.weight")
    assert 2 in sizes(graph, "q.weight", 0)


class RelativeBias(nn.Module):
    """A table [distances, heads] that is looked up, as in T5 and Swin."""

    def __init__(self, tokens=5, width=8, heads=4, dim=3, learned=True):
        super().__init__()
        self.heads, self.head_dim, self.learned = heads, dim, learned
        self.q, self.k, self.v = (nn.Linear(width, heads * dim) for _ in range(3))
        self.o, self.embed = nn.Linear(heads * dim, width), nn.Linear(3, width)
        self.fc = nn.Linear(width, 2)
        self.table = nn.Parameter(torch.zeros(2 * tokens - 1, heads))
        place = torch.arange(tokens)
        self.register_buffer("index", place[:, None] - place[None] + tokens - 1)

    def forward(self, x):
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        x = x + self.o(((q @ k.mT) + bias[None]).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return self.fc(x)


def test_relative_position_table():
    graph = prove(RelativeBias(), randn(2, 5, 3))
    (heads,) = holding(graph, "table", 1)
    assert heads.kind == "heads" and heads.exact and heads in holding(graph, "q.weight", 0)


class ALiBi(nn.Module):
    """Slopes for each head: a buffer can follow, slopes computed from the number of heads cannot."""

    def __init__(self, computed, heads=4, dim=3):
        super().__init__()
        self.heads, self.computed = heads, computed
        self.q, self.k, self.v = (nn.Linear(3, heads * dim) for _ in range(3))
        self.o = nn.Linear(heads * dim, 5)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        slopes = 2.0 ** -torch.arange(1, self.heads + 1).to(x) if self.computed else self.slopes
        distance = torch.arange(t)[None] - torch.arange(t)[:, None]
        bias = slopes[:, None, None] * distance
        return self.o(((q @ k.mT) * 0.5 + bias).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_alibi_buffer():
    graph = prove(ALiBi(False), randn(2, 5, 3))
    assert sizes(graph, "slopes", 0) == [4] and "heads" in kinds(graph)


def test_alibi_computed_freezes_heads():
    graph = prove(ALiBi(True), randn(2, 5, 3))
    assert "heads" not in kinds(graph) and "head_dim" in kinds(graph)
    assert any(r and "depend on the position (arange)" in r for r in reasons(graph, "q.weight", 0))


def test_latent_attention():
    """DeepSeek's: keys and values from a shared latent, one rotary key for all heads."""

    class MLA(nn.Module):
        def __init__(self, width=8, heads=4, nope=4, rope=2, value=3, latent=6):
            super().__init__()
            self.heads, self.nope, self.rope, self.value, self.latent = heads, nope, rope, value, latent
            self.embed = nn.Linear(3, width)
            self.q = nn.Linear(width, heads * (nope + rope))
            self.down = nn.Linear(width, latent + rope)
            self.norm = nn.RMSNorm(latent, eps=1e-6)
            self.up = nn.Linear(latent, heads * (nope + value))
            self.o, self.fc = nn.Linear(heads * value, width), nn.Linear(width, 2)

        def forward(self, x):
            x = self.embed(x)
            b, t, _ = x.shape
            q = self.q(x).view(b, t, self.heads, self.nope + self.rope).transpose(1, 2)
            q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
            latent, k_rope = self.down(x).split([self.latent, self.rope], dim=-1)
            kv = self.up(self.norm(latent)).view(b, t, self.heads, self.nope + self.value).transpose(1, 2)
            k_nope, v = kv.split([self.nope, self.value], dim=-1)
            k_rope = k_rope.view(b, 1, t, self.rope).expand(-1, self.heads, -1, -1)
            q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1)
            out = (q @ k.mT * 0.4).softmax(-1) @ v
            return self.fc(x + self.o(out.transpose(1, 2).reshape(b, t, self.heads * self.value)))

    graph = prove(MLA(), randn(2, 5, 3))
    assert "heads" in kinds(graph)
    assert sizes(graph, "norm.weight", 0) == [6] and holding(graph, "norm.weight", 0)[0].exact
    assert 3 in sizes(graph, "o.weight", 1) and {4, 3} <= set(sizes(graph, "up.weight", 0))


def test_multi_query_attention():
    class MQA(nn.Module):
        def __init__(self, heads=4, dim=6):
            super().__init__()
            self.heads, self.head_dim = heads, dim
            self.qkv, self.o = nn.Linear(3, (heads + 2) * dim), nn.Linear(heads * dim, 5)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).split([self.heads * self.head_dim, self.head_dim, self.head_dim], dim=-1)
            q = q.view(b, t, self.heads, self.head_dim).transpose(1, 2)
            out = (q @ k[:, None].mT * 0.3).softmax(-1) @ v[:, None]
            return self.o(out.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))

    graph = prove(MQA(), randn(2, 5, 3))
    assert 4 in sizes(graph, "o.weight", 1) and 6 in sizes(graph, "o.weight", 1)


@pytest.mark.parametrize("bias", [True, False])
def test_torch_attention_module(bias):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = (
                nn.Linear(3, 8),
                nn.MultiheadAttention(8, 2, batch_first=True, bias=bias),
            )
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            x = self.embed(x)
            return self.fc(x + self.attention(x, x, x, need_weights=False)[0])

    graph = prove(Block(), randn(2, 5, 3))
    assert {"heads", "head_dim"} <= set(kinds(graph)) and 8 in [g.size for g in graph.groups()], str(graph)
    assert graph.swapped == ("attention",)


@pytest.mark.parametrize("first", [True, False])
def test_torch_transformer_layer(first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 8), nn.Linear(8, 3)
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids):
            return self.fc(self.encoder(self.embed(ids)))

    graph = prove(Encoder(), torch.randint(0, 11, (2, 5)))
    assert kinds(graph).count("heads") == 2 and kinds(graph).count("neurons") == 2, str(graph)
    assert "width" in kinds(graph)


# Mixtures of experts ---------------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts as 3-D parameters, with tokens sent by one-hot, by scatter, or by gathering weights."""

    def __init__(self, how, experts=6, width=8, inner=10, top=2):
        super().__init__()
        self.how, self.experts, self.top = how, experts, top
        self.embed, self.router = nn.Linear(3, width), nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, width))
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        flat = x.reshape(-1, x.shape[-1])
        scores, index = self.router(flat).softmax(-1).topk(self.top, dim=-1)
        if self.how == "one_hot":
            weights = (F.one_hot(index, self.experts) * scores[..., None]).sum(1)
        elif self.how == "scatter":
            weights = torch.zeros(flat.shape[0], self.experts, dtype=x.dtype).scatter(1, index, scores)
        if self.how == "gather":
            hidden = torch.einsum("tw,tkwi->tki", flat, self.up[index]).relu()
            out = (torch.einsum("tki,tkiw->tkw", hidden, self.down[index]) * scores[..., None]).sum(1)
        else:
            hidden = torch.einsum("tw,ewi->tei", flat, self.up).relu()
            out = torch.einsum("tei,eiw,te->tw", hidden, self.down, weights)
        return self.fc(x + out.view(x.shape))


@pytest.mark.parametrize("how", ["one_hot", "scatter", "gather"])
def test_expert_stacks(how):
    graph = prove(Experts(how), randn(2, 5, 3))
    (experts,) = graph.groups("experts")
    assert experts.size == 6 and not experts.exact
    assert {m.tensor for m in experts.members} == {"router.weight", "up", "down"}
    assert holding(graph, "up", 2)[0].exact and sizes(graph, "up", 1) == [8]


# Recurrent layers, normed weights, sharing -----------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 2}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}]
)
def test_recurrent(kind, settings):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Linear(3, 6), kind(6, 8, batch_first=True, **settings)
            self.fc = nn.Linear(8 * (1 + bool(settings.get("bidirectional"))), 2)

        def forward(self, x):
            return self.fc(self.rnn(self.embed(x))[0])

    graph = prove(Model(), randn(2, 5, 3))
    assert sizes(graph, "rnn.weight_ih_l0", 1) == [6], str(graph)
    assert 8 in sizes(graph, "rnn.weight_hh_l0", 1), str(graph)


@pytest.mark.parametrize("kind", ["old", "parametrization", "spectral"])
def test_normed_weights(kind):
    a, b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1)
    if kind == "old":
        with pytest.warns(FutureWarning):
            a, b = nn.utils.weight_norm(a), nn.utils.weight_norm(b)
    else:
        wrap = (
            nn.utils.parametrizations.weight_norm
            if kind == "parametrization"
            else nn.utils.parametrizations.spectral_norm
        )
        a, b = wrap(a), wrap(b)
    graph = prove(nn.Sequential(a, nn.ReLU(), b), randn(2, 3, 7))
    assert [g.size for g in graph.groups()] == [8], str(graph)


def test_layer_scale_and_tied_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.gamma = nn.Parameter(torch.full((8,), 1e-6))
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(x + self.gamma * self.down(F.gelu(self.up(x))))

    graph = prove(Tied(), torch.randint(0, 11, (2, 5)))
    assert sizes(graph, "gamma", 0) == [8] and sizes(graph, "embed.weight", 1) == [8]
    assert sorted(g.size for g in graph.groups()) == [8, 12]


def test_module_used_twice():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(3, 8), shared, nn.ReLU(), shared, nn.Linear(8, 2))
    graph = prove(model, randn(2, 3))
    (group,) = graph.groups()
    assert {(m.tensor, m.dim) for m in group.members} >= {("1.weight", 0), ("1.weight", 1)}


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm([8, 4, 4])],
)
def test_group_norms(norm):
    graph = prove(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)), randn(2, 3, 4, 4))
    groups = holding(graph, "0.weight", 0)
    assert groups
    if isinstance(norm, nn.InstanceNorm2d):
        assert groups[0].exact and groups[0].size == 8
    elif isinstance(norm, nn.GroupNorm) and norm.num_groups == 2:
        assert [g.exact for g in groups if g.size == 4] == [False]


def test_bilinear():
    model = Module(
        lambda m, x, y: m.out(m.bilinear(m.a(x), m.b(y))),
        a=nn.Linear(3, 6),
        b=nn.Linear(3, 7),
        bilinear=nn.Bilinear(6, 7, 5),
        out=nn.Linear(5, 2),
    )
    graph = prove(model, randn(4, 3), randn(4, 3))
    assert sorted(g.size for g in graph.groups()) == [5, 6, 7] and all(g.exact for g in graph.groups())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode):
    model = nn.Sequential(nn.EmbeddingBag(11, 8, mode=mode), nn.Linear(8, 2))
    graph = prove(model, torch.randint(0, 11, (3, 4)))
    assert sizes(graph, "0.weight", 1) == [8] and holding(graph, "0.weight", 1)[0].exact


# What models are wrapped in --------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def test_frozen_model():
    assert kinds(prove(mlp().requires_grad_(False), randn(2, 3))) == ["neurons"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    graph = prove(mlp(), torch.randn(2, 3, dtype=dtype), dtype=dtype, power=False)
    assert kinds(graph) == ["neurons"]


def test_meta_device():
    from secateur.graph import Graph
    from secateur.surgery import Surgery

    with torch.device("meta"):
        model = Attention("3hd")
    graph = Graph.trace(model, torch.empty(2, 5, 3, device="meta"))
    Surgery({g: range(g.size // 2) for g in graph.groups()}).apply_(model)
    assert model.qkv.weight.is_meta and model.qkv.weight.shape == (3 * 2 * 3, 4)
    assert model(torch.empty(2, 5, 3, device="meta")).shape == (2, 5, 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_wrappers():
    from secateur.graph import Graph
    from secateur.surgery import Surgery

    for wrap in (nn.DataParallel, torch.compile):
        model = mlp()
        graph = Graph.trace(wrap(model), torch.randn(2, 3))
        assert graph.model is model
        Surgery({graph.groups()[0]: [1, 3]}).apply_(wrap(model))
        assert model(torch.randn(2, 3)).shape == (2, 2) and model[0].weight.shape == (2, 3)


class LoRA(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A), self.B)


def test_adapters():
    graph = prove(nn.Sequential(LoRA(nn.Linear(3, 8)), nn.ReLU(), LoRA(nn.Linear(8, 2))), randn(2, 3))
    (neurons,) = holding(graph, "0.base.weight", 0)
    assert {m.tensor for m in neurons.members} >= {"0.base.weight", "0.B", "2.base.weight", "2.A"}
    assert sizes(graph, "0.A", 0) == [4] and all(g.exact for g in graph.groups())


def test_parametrized():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    class Positive(nn.Module):
        def forward(self, w):
            return w.abs()

    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Positive())
    graph = prove(model, randn(2, 3))
    assert sorted(g.size for g in graph.groups()) == [8, 8]
    nn.utils.parametrize.register_parametrization(model[1], "weight", Symmetric())
    prove(model, randn(2, 3))


def test_loop_over_experts_is_frozen_or_right():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(6, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4)
            )
            self.embed, self.fc = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.embed(x)
            scores, index = self.router(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = index == i
                out[rows] = out[rows] + scores[rows][:, None] * expert(x[rows])
            return self.fc(x + out)

    graph = prove(Loop(), randn(9, 3), power=False)  # an expert may get no token
    assert not holding(graph, "router.weight", 0) and "numbers" in reasons(graph, "router.weight", 0)[0]
    assert sizes(graph, "experts.3.0.weight", 0) == [8] and sizes(graph, "experts.3.0.weight", 1) == [6]


def test_scale_from_size_is_not_silent():
    class Scaled(nn.Module):
        def __init__(self, heads=2, dim=6):
            super().__init__()
            self.heads = heads
            self.q, self.k, self.v, self.o = (
                *(nn.Linear(3, heads * dim) for _ in range(3)),
                nn.Linear(heads * dim, 4),
            )

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(
                ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1).matmul(v).transpose(1, 2).flatten(2)
            )

    graph = prove(Scaled(), randn(2, 5, 3))
    assert "heads" in kinds(graph)
