"""Sparse layers behave as the dense ones they stand for, in everything that torch does to a module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from secateur.core.errors import ArtifactError, SecateurError
from secateur.runtime import native
from secateur.runtime.formats import Bitmask, Blocks, Indexed
from secateur.runtime.linear import NEVER, SparseConv1x1, SparseLinear, dense_of
from secateur.runtime.plan import Plan

FORMATS = [
    lambda w: Bitmask.pack(w),
    lambda w: Bitmask.pack(w, dtype=torch.bfloat16),
    lambda w: Bitmask.pack(w, dtype=torch.int8),
    lambda w: Indexed.pack(w),
    lambda w: Blocks.pack(w),
]


def weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(100, 200, generator=generator) * (torch.rand(100, 200, generator=generator) < 0.4)


def layer(pack=FORMATS[0], planned=False, switch=NEVER):
    packed = pack(weight())
    plan = Plan.of(packed) if planned and native.library() is not None else None
    return SparseLinear(packed, torch.linspace(-1, 1, 100), plan, switch)


def exact(sparse, x):
    """The product in float64."""
    return x.double() @ sparse.packed.unpack(torch.float64).T + sparse.bias.double()


@pytest.fixture
def x():
    return torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pack", FORMATS)
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_equals_the_dense_layer(pack, planned, dtype, x):
    sparse = layer(pack, planned, 8)
    expected = exact(sparse, x.to(dtype))
    y = sparse(x.to(dtype))
    assert y.dtype == dtype
    assert y.shape == (2, 5, 100)
    limit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
    assert torch.allclose(y.double(), expected, rtol=limit, atol=limit * 10)


@pytest.mark.parametrize("pack", FORMATS)
def test_gradients_reach_the_input(pack, x):
    sparse = layer(pack)
    x.requires_grad_()
    sparse(x).square().sum().backward()
    found, x.grad = x.grad, None
    exact(sparse, x).square().sum().backward()
    assert torch.allclose(found, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pack", FORMATS)
@pytest.mark.parametrize("planned", [False, True])
def test_copies_compute_the_same(pack, planned, x):
    sparse = layer(pack, planned, 4)
    sparse(x)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))
    other = layer(pack, planned, 4)
    other.get_buffer("values").zero_()
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x))


def test_casting_a_model_leaves_the_weights(x):
    sparse = layer(FORMATS[1])
    before = sparse(x)
    sparse.half().to(torch.float64)
    assert sparse.get_buffer("values").dtype == torch.bfloat16
    assert torch.equal(sparse(x), before)


def test_damage_is_found_before_it_is_read(x):
    sparse = layer()
    sparse.get_buffer("starts")[3] = 2**40
    with pytest.raises(ArtifactError, match="SparseLinear is damaged"):
        sparse(x)
    with pytest.raises(ArtifactError, match="damaged"):
        sparse(x.requires_grad_())
    sparse = layer()
    sparse(x.detach())
    sparse.get_buffer("mask").fill_(255)
    with pytest.raises(ArtifactError, match="damaged"):
        sparse(x.detach())
    sparse = layer(planned=True, switch=0)
    sparse(x.detach())
    state = sparse.state_dict() | {"mask": torch.full_like(sparse.get_buffer("mask"), 255)}
    sparse.load_state_dict(state)
    with pytest.raises(ArtifactError, match="damaged"):
        sparse(x.detach())


def test_a_bias_of_another_type_is_refused(x):
    sparse = layer()
    sparse(x)
    sparse.load_state_dict({**sparse.state_dict(), "bias": sparse.bias.half()}, assign=True)
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(ArtifactError, match=r"its bias are torch.float16"):
            sparse(given)


@pytest.mark.parametrize("pack", FORMATS)
@pytest.mark.parametrize("planned", [False, True])
def test_weights_may_be_written_to(pack, planned, x):
    sparse = layer(pack, planned, 0)
    before = sparse(x) - sparse.bias
    sparse.get_buffer("values").neg_()
    assert torch.allclose(sparse(x) - sparse.bias, -before, atol=1e-4)


def test_bad_input(x):
    with pytest.raises(SecateurError, match=r"takes 200 inputs; got a tensor of shape \(3, 7\)"):
        layer()(torch.ones(3, 7))
    with pytest.raises(SecateurError, match=r"bias has shape \(3,\) for 100 outputs"):
        SparseLinear(FORMATS[0](weight()), torch.ones(3))


def test_no_tokens():
    assert layer()(torch.ones(0, 200)).shape == (0, 100)
    assert layer(planned=True, switch=0)(torch.ones(2, 0, 200)).shape == (2, 0, 100)


@pytest.mark.parametrize("pack", FORMATS)
@pytest.mark.parametrize("planned", [False, True])
def test_the_operator_is_sound(pack, planned, x):
    sparse = layer(pack, planned, 4)
    buffers = [sparse.get_buffer(n) for n in sparse.packed.buffers()]
    plan = [] if sparse.plan is None else list(sparse.plan.buffers())
    arguments = (x.requires_grad_(), buffers, plan, sparse.bias, 100, 200, sparse.group, 4)
    torch.library.opcheck(torch.ops.secateur.linear.default, arguments)


@pytest.mark.parametrize("planned", [False, True])
def test_it_is_compiled_whole(planned, x):
    sparse = layer(planned=planned, switch=4)
    with torch.no_grad():
        assert torch.equal(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


@pytest.mark.parametrize("planned", [False, True])
def test_it_is_exported_saved_and_loaded(planned, x):
    sparse = layer(planned=planned, switch=4)
    file = io.BytesIO()
    torch.export.save(torch.export.export(sparse, (x,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), sparse(x))


def test_modes_see_the_operator(x):
    traced = make_fx(layer())(x)
    assert torch.ops.secateur.linear.default in [n.target for n in traced.graph.nodes]


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution(stride, memory):
    sparse = SparseConv1x1(FORMATS[0](weight()), torch.linspace(-1, 1, 100), None, NEVER, stride)
    x = torch.randn(2, 200, 7, 9).to(memory_format=memory)
    expected = dense_of(sparse)(x)
    assert torch.allclose(sparse(x), expected, rtol=1e-4, atol=1e-4)
    assert sparse(x).is_contiguous(memory_format=torch.channels_last)


def test_what_it_says_of_itself():
    text = repr(nn.Sequential(layer(FORMATS[1])))
    sparsity = 1 - float((weight() != 0).float().mean())
    assert f"out_features=100, bias=True, bitmask, bfloat16, sparsity={sparsity:.1%}" in text


def test_pickles_of_layers_hold_no_pointers():
    sparse = layer()
    sparse(torch.ones(1, 200))
    assert sparse.__getstate__()["_calls"] is None
