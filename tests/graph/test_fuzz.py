"""Random networks from a vocabulary of layers: the proof holds, or the graph freezes what it must."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.graph.prove import prove

WIDTHS = st.sampled_from([4, 6, 8, 12])
ACTIVATIONS = (torch.relu, F.gelu, torch.tanh, torch.sigmoid, F.silu, torch.square)


class Network(nn.Module):
    """Steps, each a name, the modules that it has, and numbers; tensors `[batch, tokens, width]`."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.layers = nn.ModuleList()
        self.plan = []

    def finish(self, width):
        self.last = nn.Linear(width, 2)
        return self

    def forward(self, x):
        x = self.first(x)
        skips = []
        for (name, number), layers in zip(self.plan, self.layers, strict=True):
            x = STEPS[name](x, skips, layers, number)
        return self.last(x)


def linear(x, skips, layers, n):
    return layers[0](x)


def activation(x, skips, layers, n):
    return ACTIVATIONS[n](x)


def keep(x, skips, layers, n):
    skips.append(x)
    return x


def add(x, skips, layers, n):
    return x + layers[0](skips[n])


def beside(x, skips, layers, n):
    return torch.cat((x, skips[n]), -1)


def gate(x, skips, layers, n):
    a, b = x.chunk(2, -1)
    return a * b.sigmoid()


def parts(x, skips, layers, n):
    a, b = x[..., :n], x[..., n:]
    return torch.cat((b, a.relu()), -1)


def heads(x, skips, layers, n):
    b, t, _ = x.shape
    q, k, v = (layer(x).view(b, t, n, -1).transpose(1, 2) for layer in layers)
    return (q @ k.mT * 0.3).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, -1)


def fused(x, skips, layers, n):
    b, t, _ = x.shape
    q, k, v = layers[0](x).view(b, t, 3, n, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2)


def literal(x, skips, layers, n):
    return x.reshape(x.shape[0], x.shape[1], n, x.shape[2] // n).transpose(2, 3).reshape(x.shape)


def conv(x, skips, layers, n):
    return layers[0](x.transpose(1, 2)).transpose(1, 2)


def pool(x, skips, layers, n):
    return x + x.mean(1, keepdim=True)


def squeeze(x, skips, layers, n):
    return x * layers[0](x.mean(1, keepdim=True)).sigmoid()


def normed(x, skips, layers, n):
    return layers[0](x)


def shuffled(x, skips, layers, n):
    return x.unflatten(-1, (n, -1)).transpose(-1, -2).flatten(-2)


def expand(x, skips, layers, n):
    return x.repeat_interleave(2, -1)


STEPS = {
    f.__name__: f
    for f in (
        linear,
        activation,
        keep,
        add,
        beside,
        gate,
        parts,
        heads,
        fused,
        literal,
        conv,
        pool,
        squeeze,
        normed,
        shuffled,
        expand,
    )
}


def divisor(draw, n):
    return draw(st.sampled_from([k for k in (2, 3, 4) if n % k == 0]))


@st.composite
def networks(draw):
    width = draw(WIDTHS)
    torch.manual_seed(0)
    net, kept = Network(width), []
    for name in draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7)):
        layers, n, out = [], 0, width
        if name in ("beside", "expand") and width > 16:
            continue
        if name in ("add", "beside"):
            if not kept:
                continue
            n = draw(st.integers(0, len(kept) - 1))
            layers = [nn.Linear(kept[n], width) if draw(st.booleans()) or kept[n] != width else nn.Identity()]
            out = width + kept[n] if name == "beside" else width
        elif name == "linear":
            out = draw(WIDTHS)
            layers = [nn.Linear(width, out, bias=draw(st.booleans()))]
        elif name == "activation":
            n = draw(st.integers(0, len(ACTIVATIONS) - 1))
        elif name == "keep":
            kept.append(width)
        elif name in ("gate", "parts") and width % 2:
            continue
        elif name == "gate":
            out = width // 2
        elif name == "parts":
            n = draw(st.integers(1, width - 1))
        elif name in ("heads", "fused", "literal", "shuffled"):
            if width % 2 and width % 3:
                continue
            n = divisor(draw, width)
            layers = [nn.Linear(width, width) for _ in range(3)] if name == "heads" else []
            layers = [nn.Linear(width, 3 * width)] if name == "fused" else layers
        elif name == "conv":
            groups = draw(st.sampled_from([1, 2, width])) if width % 2 == 0 else 1
            out = width * draw(st.sampled_from([1, 2])) if width <= 12 else width
            layers = [nn.Conv1d(width, out, 3, padding=1, groups=groups)]
        elif name == "squeeze":
            layers = [nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width))]
        elif name == "normed":
            layers = [
                draw(st.sampled_from([nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5), nn.Identity()]))
            ]
        elif name == "expand":
            out = 2 * width
        if out < 2:
            continue
        net.plan.append((name, n))
        net.layers.append(nn.ModuleList(layers))
        width = out
    return net.finish(width)


@given(networks())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_networks(net):
    prove(net, torch.randn(2, 3, 3, dtype=torch.float64), power=False, backward=False)
