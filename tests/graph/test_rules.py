"""One small model for each operator of each family of rules: what can be cut, cut and compared."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph import rule
from secateur.graph.rules import RULES
from tests.graph.prove import Module, prove

N = 8


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def vectors(function, out=N, **parts):
    """Linear, function, linear, on `[batch, 3]`."""
    return Module(
        lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(3, N), b=nn.Linear(out, 2), **parts
    ), randn(5, 3)


def images(function, out=N, **parts):
    """Convolution, function, convolution, on `[batch, 3, 4, 4]`."""
    model = Module(
        lambda m, x: m.b(function(m, m.a(x))), a=nn.Conv2d(3, N, 1), b=nn.Conv2d(out, 2, 1), **parts
    )
    return model, randn(2, 3, 4, 4)


VIEWS = {
    "view": lambda m, x: x.view(x.shape[0], 2, -1).flatten(1),
    "permute": lambda m, x: x[:, :, None].permute(2, 0, 1)[0],
    "mT": lambda m, x: x.mT.mT,
    "unsqueeze and squeeze": lambda m, x: x.unsqueeze(1).squeeze(1),
    "squeeze all": lambda m, x: x[:, None, :, None].squeeze(),
    "expand": lambda m, x: x[:, None].expand(-1, 3, -1).sum(1),
    "unflatten": lambda m, x: x.unflatten(1, (-1, 2)).flatten(1),
    "split": lambda m, x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    "tensor_split": lambda m, x: torch.cat(x.tensor_split(2, 1), 1),
    "narrow": lambda m, x: torch.cat((x.narrow(1, 0, 3), x.narrow(1, 3, x.shape[1] - 3)), 1),
    "movedim": lambda m, x: x.view(-1, 1, x.shape[1]).movedim(-1, 0).movedim(0, -1)[:, 0],
    "swapaxes": lambda m, x: x.swapaxes(0, 1).swapaxes(0, 1),
    "contiguous": lambda m, x: x.t().contiguous().t(),
    "view as": lambda m, x: x.reshape(-1).view_as(x),
    "tile": lambda m, x: x.tile(1, 2)[:, : x.shape[1]],
    "atleast": lambda m, x: torch.atleast_3d(x)[..., 0],
    "ravel": lambda m, x: x.ravel().view(x.shape),
    "hsplit": lambda m, x: torch.cat(torch.hsplit(x, 2), 1),
}
POINTWISE = {
    name: (lambda m, x, f=f: f(x))
    for name, f in {
        "relu": torch.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "mish": F.mish,
        "elu": F.elu,
        "selu": F.selu,
        "celu": F.celu,
        "softplus": F.softplus,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "leaky": F.leaky_relu,
        "logsigmoid": F.logsigmoid,
        "tanhshrink": F.tanhshrink,
        "softshrink": F.softshrink,
        "hardshrink": F.hardshrink,
        "relu6": F.relu6,
        "threshold": lambda x: F.threshold(x, 0.1, 2.0),
        "erf": torch.erf,
        "abs": torch.abs,
        "neg": torch.neg,
        "sign": torch.sign,
        "sin": torch.sin,
        "exp": torch.exp,
        "log": lambda x: (x.abs() + 1).log(),
        "rsqrt": lambda x: (x.square() + 1).rsqrt(),
        "power": lambda x: x**3,
        "reciprocal": lambda x: 1 / (x.abs() + 1),
        "clamp": lambda x: x.clamp(-0.5, 0.5),
        "lerp": lambda x: x.lerp(x.relu(), 0.3),
        "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
        "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1),
        "maximum": lambda x: torch.maximum(x, x.sin()),
        "where": lambda x: torch.where(x > 0, x, 2.0),
        "in place": lambda x: x.mul_(2).add_(1).relu_(),
        "float and back": lambda x: x.float().double(),
        "nan_to_num": torch.nan_to_num,
        "remainder": lambda x: x.remainder(0.7),
        "round": lambda x: x.round(),
        "detach": lambda x: x.detach(),
        "clone": lambda x: x.clone(),
        "atan2": lambda x: torch.atan2(x, x + 3),
        "comparison": lambda x: (x > 0) * x,
        "xor": lambda x: ((x > 0) ^ (x > 1)) * x,
        "logit": lambda x: x.sigmoid().logit(),
        "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
        "dropout": lambda x: F.dropout(x, 0.5, False),
        "zeros added": lambda x: x + torch.zeros_like(x),
        "ones multiplied": lambda x: x * torch.ones(x.shape[-1], dtype=x.dtype),
        "a new tensor": lambda x: x + x.new_zeros(x.shape),
        "copied": lambda x: torch.empty_like(x).copy_(x),
    }.items()
}
SPATIAL = {
    "max pool": (lambda m, x: F.max_pool2d(x, 2), N),
    "average pool": (lambda m, x: F.avg_pool2d(x, 2), N),
    "adaptive": (lambda m, x: F.adaptive_avg_pool2d(x, 2), N),
    "adaptive max": (lambda m, x: F.adaptive_max_pool2d(x, 2), N),
    "nearest": (lambda m, x: F.interpolate(x, scale_factor=2), N),
    "bilinear": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), N),
    "bicubic": (lambda m, x: F.interpolate(x, size=6, mode="bicubic"), N),
    "reflected pixels": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), N),
    "replicated pixels": (lambda m, x: F.pad(x, (1, 1, 0, 0), mode="replicate"), N),
    "circular pixels": (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular"), N),
    "cropped": (lambda m, x: F.pad(x, (-1, -1)), N),
    "flipped": (lambda m, x: x.flip(2), N),
    "windows": (lambda m, x: F.fold(F.unfold(x, 2), (4, 4), 2), N),
    "unfolded": (lambda m, x: F.unfold(x, 2, stride=2).unflatten(2, (2, 2)), 4 * N),
    "grid": (lambda m, x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=x.dtype), align_corners=False), N),
    "lp pool": (lambda m, x: F.lp_pool2d(x, 2, 2), N),
    "mean of pixels": (lambda m, x: x.mean((2, 3), keepdim=True), N),
    "largest pixel": (lambda m, x: x.amax((2, 3), keepdim=True), N),
    "local response": (lambda m, x: x * x.sum((2, 3), keepdim=True), N),
    "beside": (lambda m, x: torch.cat((x, x.relu(), x.tanh()), 1), 3 * N),
    "stacked": (lambda m, x: torch.stack((x, -x), 2).flatten(1, 2), 2 * N),
    "Fourier of pixels": (lambda m, x: torch.fft.rfft2(x).abs(), N),
    "spatial softmax": (lambda m, x: x.flatten(2).softmax(-1).view(x.shape), N),
    "variance of pixels": (lambda m, x: x.var((2, 3), keepdim=True), N),
    "sort of pixels": (lambda m, x: x.sort(-1).values, N),
    "cumsum of pixels": (lambda m, x: x.cumsum(-1), N),
    "indexed pixels": (lambda m, x: x[..., [2, 0, 1]], N),
    "batch norm": (lambda m, x: m.norm(x), N, {"norm": nn.BatchNorm2d(N)}),
    "dropout2d": (lambda m, x: F.dropout2d(x, 0.5, False), N),
    "grouped": (lambda m, x: m.c(x), 12, {"c": nn.Conv2d(N, 12, 3, padding=1, groups=4)}),
    "transposed": (lambda m, x: m.c(x), 6, {"c": nn.ConvTranspose2d(N, 6, 3)}),
    "attention to channels": (
        lambda m, x: x * m.d(m.c(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        N,
        {"c": nn.Conv2d(N, 4, 1), "d": nn.Conv2d(4, N, 1)},
    ),
}
CONTRACTIONS = {
    "matmul": (lambda m, x: x @ m.w, (N, 6)),
    "matmul of a stack": (lambda m, x: (x[None] @ m.w).sum(0), (3, N, 6)),
    "mv": (lambda m, x: (m.w @ x.t()).t(), (6, N)),
    "addmm": (lambda m, x: torch.addmm(x.new_ones(1), x, m.w), (N, 6)),
    "baddbmm": (lambda m, x: torch.baddbmm(x.new_ones(1, 1, 1), x[None], m.w[None])[0], (N, 6)),
    "einsum": (lambda m, x: torch.einsum("bi,io->bo", x, m.w), (N, 6)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, ([1], [0])), (N, 6)),
    "inner": (lambda m, x: torch.inner(x, m.w), (6, N)),
    "linear": (lambda m, x: F.linear(x, m.w), (6, N)),
    "by hand": (lambda m, x: (x[:, :, None] * m.w).sum(1), (N, 6)),
    "chain": (lambda m, x: torch.linalg.multi_dot((x, m.w, m.w.t(), m.w)), (N, 6)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    model, x = vectors(VIEWS[name])
    graph = prove(model, x)
    assert graph.groups() and all(g.exact for g in graph.groups()), str(graph)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name):
    model, x = vectors(POINTWISE[name])
    graph = prove(model, x, power=False)
    assert len(graph.groups()) == 1 and graph.groups()[0].exact, str(graph)


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial(name):
    function, out, *parts = SPATIAL[name]
    model, x = images(function, out, **(parts[0] if parts else {}))
    graph = prove(model, x, power=False)
    assert graph.groups() and all(g.exact for g in graph.groups()), str(graph)


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions(name):
    function, shape = CONTRACTIONS[name]
    model, x = vectors(function, 6, w=nn.Parameter(torch.empty(shape)))
    graph = prove(model, x)
    assert {N, 6} <= {g.size for g in graph.groups()} and all(g.exact for g in graph.groups()), str(graph)


def test_an_operator_without_a_rule_freezes_and_is_named():
    def crossed(m, x):
        triples = x[:, :6].view(-1, 2, 3)
        return torch.linalg.cross(triples, triples).sum((1, 2))[:, None] * x

    model, x = vectors(crossed)
    graph = prove(model, x, power=False)
    assert [g.size for g in graph.groups()] == [2]  # what the slices left out
    assert "aten::linalg_cross" in graph.types.unknown


def test_a_rule_can_be_added():
    """A library's own operator is frozen until it has a rule."""
    with torch.library._scoped_library("secateur_test", "FRAGMENT") as library:
        library.define("scale_rows(Tensor x, Tensor scale) -> Tensor")
        library.impl("scale_rows", lambda x, scale: x * scale, "CompositeExplicitAutograd")
        operator = torch.ops.secateur_test.scale_rows.default
        model, x = vectors(lambda m, x: operator(x, m.w), w=nn.Parameter(torch.empty(N)))
        assert not prove(model, x, backward=False).groups()

        @rule("secateur_test::scale_rows")
        def scale_rows(types, call):
            types.unify(types.dims(call["x"])[1], types.dims(call["scale"])[0])
            types.like(call.out, types.dims(call["x"]), call["x"])

        try:
            (neurons,) = prove(model, x, backward=False).groups()
            assert "w" in {m.tensor for m in neurons.members} and neurons.exact
        finally:
            del RULES["secateur_test::scale_rows"]
