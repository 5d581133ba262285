"""Attention with sliced projections, against torch's own module and against the formula written out."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import SecateurError
from secateur.core.modes import unfused
from secateur.swaps import SlimMultiheadAttention, swap_

N, L, S, E, H = 2, 3, 4, 12, 3


def attention(seed=0, **settings):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(E, H, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def slim_twin(module):
    twin = copy.deepcopy(module)
    swap_(twin)
    assert type(twin) is SlimMultiheadAttention
    return twin


def inputs(module, *, unbatched=False, self_attention=False):
    """Query, key and value in the layout that the module wants."""

    def made(length, width):
        x = torch.randn(length, width) if unbatched else torch.randn(N, length, width)
        return (x if module.batch_first or unbatched else x.transpose(0, 1).contiguous()).requires_grad_()

    if self_attention:
        x = made(S, E)
        return x, x, x
    return made(L, E), made(S, module.kdim), made(S, module.vdim)


def masks(kind, length, unbatched):
    """attn_mask and key_padding_mask; no query is without any key to attend to."""
    rows = 1 if unbatched else N
    dims = {"2": (length, S), "3": (rows * H, length, S)}
    attn = pad = None
    if kind[0] in dims:
        attn = torch.rand(dims[kind[0]]) < 0.4
        attn[..., 0] = False
    if "p" in kind:
        pad = torch.zeros(rows, S, dtype=torch.bool)
        pad[0, 2:] = True
        pad = pad[0] if unbatched else pad
    if "f" in kind:
        attn = None if attn is None else torch.randn(attn.shape).masked_fill(attn, float("-inf"))
        pad = None if pad is None else torch.zeros(pad.shape).masked_fill(pad, float("-inf"))
    return {"attn_mask": attn, "key_padding_mask": pad}


SETTINGS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias of keys": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "other widths": {"kdim": 5, "vdim": 7},
    "other widths, all": {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.4},
}
CALLS = list(itertools.product([(True, True), (True, False), (False, True)], [False, True], [False, True]))


@pytest.mark.parametrize("mask", ["none", "2f", "3", "p", "2p", "3pf"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_results_and_gradients_are_those_of_torch(settings, mask):
    for (need_weights, average), unbatched, batch_first in CALLS:
        for self_attention in (False, True):
            if self_attention and "kdim" in SETTINGS[settings]:
                continue
            module = attention(batch_first=batch_first, **SETTINGS[settings])
            twin = slim_twin(module)
            length = S if self_attention else L
            given_masks = masks(mask, length, unbatched)
            x = inputs(module, unbatched=unbatched, self_attention=self_attention)
            results = []
            for one in (module, twin):
                torch.manual_seed(1)
                fresh = [t.detach().requires_grad_() for t in dict.fromkeys(x)]
                args = fresh * 3 if self_attention else fresh
                out, weights = one(
                    *args, need_weights=need_weights, average_attn_weights=average, **given_masks
                )
                loss = (out * torch.arange(out.numel()).view(out.shape)).sum()
                loss = loss if weights is None else loss + (weights**2).sum()
                grads = torch.autograd.grad(loss, [*fresh, *one.parameters()])
                results.append([out, *([] if weights is None else [weights]), *grads])
            assert len(results[0]) == len(results[1])
            for a, b in zip(*results, strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * (1 + float(a.detach().abs().max())))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}])
def test_the_causal_hint_is_that_of_torch(need_weights, padded, extra):
    module = attention(batch_first=True, **extra)
    x, _, _ = inputs(module, self_attention=True)
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    pad = torch.zeros(N, S).masked_fill(torch.arange(S) == S - 1, float("-inf")) if padded else None
    given_masks = {"attn_mask": mask, "key_padding_mask": pad, "is_causal": True}
    expected, weights = module(x, x, x, need_weights=need_weights, **given_masks)
    out, slim_weights = slim_twin(module)(x, x, x, need_weights=need_weights, **given_masks)
    torch.testing.assert_close(out, expected)
    assert weights is None or torch.allclose(weights, slim_weights, atol=1e-6)
    with pytest.raises(SecateurError, match="attn_mask is missing"):
        slim_twin(module)(x, x, x, is_causal=True)


def test_evaluation_equals_the_fused_kernel():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 2, batch_first=True).eval()
    x = torch.randn(N, S, 12)
    with torch.no_grad():
        expected, weights = module(x, x, x)
        out, slim_weights = slim_twin(module)(x, x, x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(slim_weights, weights)


def written_out(x, wq, wk, wv, bq, bk, bv, wo, bo, heads, scale):
    """Attention of one sequence [S, E], head by head."""
    out = bo.clone()
    for q, k, v, b, c, d, o in zip(
        *(w.chunk(heads) for w in (wq, wk, wv, bq, bk, bv)), wo.chunk(heads, 1), strict=True
    ):
        weights = torch.softmax((x @ q.T + b) @ (x @ k.T + c).T * scale, -1)
        out = out + weights @ (x @ v.T + d) @ o.T
    return out


@given(st.data(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_sliced_heads_sizes_and_widths_equal_attention_written_out(data, batch_first):
    """Heads, sizes of queries and keys, of values, the input width and the output width, each its own."""

    def some(n, least=1):
        chosen = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=least, max_size=n))
        return torch.tensor(sorted(chosen))

    D = E // H
    heads, of_qk, of_v, width, out = some(H), some(D), some(D), some(E), some(E)
    module = slim_twin(attention(batch_first=batch_first))
    qk = (heads[:, None] * D + of_qk).flatten()
    v = (heads[:, None] * D + of_v).flatten()
    rows = torch.cat([qk, E + qk, 2 * E + v])
    module.in_proj_weight = nn.Parameter(module.in_proj_weight[rows][:, width])
    module.in_proj_bias = nn.Parameter(module.in_proj_bias[rows])
    module.out_proj.weight = nn.Parameter(module.out_proj.weight[out][:, v])
    module.out_proj.bias = nn.Parameter(module.out_proj.bias[out])
    module.num_heads = len(heads)

    wq, wk, wv = module.in_proj_weight.split([len(qk), len(qk), len(v)])
    bq, bk, bv = module.in_proj_bias.split([len(qk), len(qk), len(v)])
    x = torch.randn(S, len(width))
    expected = written_out(
        x, wq, wk, wv, bq, bk, bv, module.out_proj.weight, module.out_proj.bias, len(heads), D**-0.5
    )
    for need_weights, args in itertools.product((True, False), ([x] * 3, [x, x.clone(), x.clone()])):
        torch.testing.assert_close(module(*args, need_weights=need_weights)[0], expected)


@pytest.mark.parametrize("settings", ["other widths, all", "both"])
def test_removing_a_head_is_removing_its_output(settings):
    """With extra keys and separate projections too: the twin has zeros where `out_proj` read the head."""
    module = attention(**SETTINGS[settings])
    slim, kept = slim_twin(module), torch.cat([torch.arange(0, 4), torch.arange(8, 12)])
    with torch.no_grad():
        module.out_proj.weight[:, 4:8] = 0
    if slim.in_proj_weight is None:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            setattr(slim, name, nn.Parameter(getattr(slim, name)[kept]))
    else:
        slim.in_proj_weight = nn.Parameter(slim.in_proj_weight.unflatten(0, (3, E))[:, kept].flatten(0, 1))
    if slim.in_proj_bias is not None:
        slim.in_proj_bias = nn.Parameter(slim.in_proj_bias.view(3, E)[:, kept].flatten())
    slim.bias_k, slim.bias_v = (nn.Parameter(b[..., kept]) for b in (slim.bias_k, slim.bias_v))
    slim.out_proj.weight = nn.Parameter(slim.out_proj.weight[:, kept])
    slim.num_heads = 2
    x = inputs(module)
    expected, weights = module(*x, average_attn_weights=False)
    out, slim_weights = slim(*x, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(slim_weights, weights[:, [0, 2]])
    torch.testing.assert_close(slim(*x, need_weights=False)[0], expected)


def test_the_scale_stays_when_dimensions_go():
    module = slim_twin(attention())
    assert module.scale == pytest.approx((E // H) ** -0.5)
    swap_(module)
    assert module.scale == pytest.approx((E // H) ** -0.5)


def encoder(**settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, dim_feedforward=16, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2).eval()


def test_transformer_layers_do_not_take_their_fused_kernel():
    model, x = encoder(), torch.randn(N, S, 12)
    with torch.no_grad():
        expected = model(x)
        swapped = swap_(model)
        torch.testing.assert_close(model(x), expected)
        for layer in model.layers:  # two of four heads: for an odd number torch has no fused kernel
            rows = torch.cat([torch.arange(6) + 12 * i for i in range(3)])
            inner = layer.self_attn
            inner.in_proj_weight = nn.Parameter(inner.in_proj_weight[rows])
            inner.in_proj_bias = nn.Parameter(inner.in_proj_bias[rows])
            inner.out_proj.weight = nn.Parameter(inner.out_proj.weight[:, :6])
            inner.num_heads = 2
        assert model(x).shape == x.shape
        assert torch.equal(model(x), model.train().eval()(x))
    assert len(swapped.attention) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padding_in_an_encoder():
    model, x = encoder(), torch.randn(N, S, 12)
    pad = torch.tensor([[False] * S, [False, False, True, True]])
    with torch.no_grad():
        with unfused():
            expected = model(x, src_key_padding_mask=pad)
        fused = model(x, src_key_padding_mask=pad)
        swapped = swap_(model)
        assert swapped.encoders == (model,)
        out = model(x, src_key_padding_mask=pad)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(out[~pad], fused[~pad])
        swapped.undo()
        assert model.use_nested_tensor
        torch.testing.assert_close(model(x, src_key_padding_mask=pad), fused)


def test_a_whole_transformer():
    torch.manual_seed(0)
    model = nn.Transformer(12, 2, 1, 1, 16, batch_first=True).eval()
    source, target = torch.randn(N, S, 12), torch.randn(N, L, 12)
    mask = model.generate_square_subsequent_mask(L)
    with torch.no_grad():
        expected = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        swap_(model)
        torch.testing.assert_close(model(source, target, tgt_mask=mask, tgt_is_causal=True), expected)


def test_a_swap_changes_nothing_else_and_is_undone():
    module = attention()
    before, state = dict(module.__dict__), copy.deepcopy(module.state_dict())
    swapped = swap_(module)
    assert list(module.state_dict()) == list(state)
    other = attention(seed=1)
    other.load_state_dict(module.state_dict())
    fresh = slim_twin(attention(seed=2))
    fresh.load_state_dict(state)
    x = inputs(module)
    for twin in (other, fresh, copy.deepcopy(module)):
        torch.testing.assert_close(twin(*x), module(*x))
    assert copy.deepcopy(module).scale == module.scale
    swapped.undo()
    swapped.undo()
    assert type(module) is nn.MultiheadAttention and module.__dict__ == before


def test_subclasses_stay_what_they_are():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([Own(E, H), nn.MultiheadAttention(E, H)])
    assert swap_(model).attention == (model[1],)
    assert type(model[0]) is Own
    assert swap_(model).attention == ()


@pytest.mark.parametrize("need_weights", [False, True])
def test_export(need_weights):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention(batch_first=True)

        def forward(self, x, pad):
            return self.attention(x, x, x, key_padding_mask=pad, need_weights=need_weights)[0]

    model = Wrapped().eval()
    swap_(model)
    x, pad = torch.randn(N, S, E), torch.zeros(N, S, dtype=torch.bool)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    program = torch.export.export(model, (x, pad), dynamic_shapes=shapes).module()
    x, pad = torch.randn(5, 7, E), torch.zeros(5, 7, dtype=torch.bool)
    pad[0, 3:] = True
    torch.testing.assert_close(program(x, pad), model(x, pad))


def test_a_batch_without_examples():
    module = attention(batch_first=True)
    x = torch.randn(0, S, E)
    assert slim_twin(module)(x, x, x, need_weights=False)[0].shape == module(x, x, x)[0].shape


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"attn_mask": torch.zeros(L, S + 1)}, "attn_mask has the shape"),
        ({"attn_mask": torch.zeros(N, L, S)}, "for 2 sequences and 3 heads"),
        ({"key_padding_mask": torch.zeros(N, L)}, "key_padding_mask has the shape"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "neither boolean nor floating-point"),
    ],
)
def test_masks_that_do_not_fit_are_refused(settings, complaint):
    module = attention()
    with pytest.raises(SecateurError, match=complaint):
        slim_twin(module)(*inputs(module), **settings)


def test_nested_tensors_are_refused():
    module = slim_twin(attention(batch_first=True))
    x = torch.nested.as_nested_tensor([torch.randn(2, E), torch.randn(3, E)], layout=torch.jagged)
    with pytest.raises(SecateurError, match="nested"):
        module(x, x, x)
