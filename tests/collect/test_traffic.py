"""Inputs and output gradients as matrices: unfolded convolutions, and the norms measured from them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.collect.traffic import inputs_GNTI, outputs_GNTO
from secateur.core.layout import layout_of
from tests.reference import Attention, Recurrent, close, gpt2

LAYERS = {
    "linear": (nn.Linear(4, 6, bias=False), (4,)),
    "linear on sequences": (nn.Linear(4, 6, bias=False), (3, 4)),
    "linear on grids": (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (4, 9)),
    "1d same": (nn.Conv1d(4, 6, 5, dilation=2, padding="same", groups=2, bias=False), (4, 9)),
    "1d circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", bias=False), (4, 9)),
    "2d": (nn.Conv2d(4, 6, (2, 3), stride=(3, 1), padding=(1, 2), bias=False), (4, 7, 8)),
    "2d pointwise": (nn.Conv2d(4, 6, 1, bias=False), (4, 7, 8)),
    "2d dilated groups": (nn.Conv2d(4, 6, (3, 2), dilation=(2, 3), groups=2, bias=False), (4, 7, 8)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, padding="valid", groups=4, bias=False), (4, 7, 8)),
    "2d same": (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2), bias=False), (4, 7, 8)),
    "2d reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", bias=False), (4, 7, 8)),
    "2d replicate": (nn.Conv2d(4, 6, 3, padding=(0, 3), padding_mode="replicate", bias=False), (4, 7, 8)),
    "2d circular": (nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular", bias=False), (4, 7, 8)),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=1, groups=2, bias=False), (4, 3, 4, 5)),
    "3d replicate": (nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate", bias=False), (4, 3, 4, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_input_matrix_times_weight_matrix_is_the_output(kind):
    layer, shape = LAYERS[kind]
    x = torch.randn(5, *shape)
    y = layer(x)
    w_OI = layout_of(layer, "weight").matrix(layer.weight)
    x_GNTI, y_GNTO = inputs_GNTI(layer, x), outputs_GNTO(layer, y)
    w_GOI = w_OI.reshape(x_GNTI.shape[0], -1, w_OI.shape[1])
    assert close(torch.einsum("gnti,goi->gnto", x_GNTI, w_GOI), y_GNTO)
    assert y_GNTO.numel() == y.numel()


def norm(layer: nn.Module, batches: list, name: str = "weight") -> Tensor:
    return sc.collect(layer, [sc.InputNorm()], batches).stats[name][sc.InputNorm()]


def unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Patches [tokens, taps * channels] by torch's own unfold, whose columns are channels, then taps."""
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    split = columns.unflatten(1, (x.shape[1], taps))  # examples, channels, taps, places
    return split.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def test_norms_of_a_convolution_are_those_of_the_unfolded_input():
    layer, x = nn.Conv2d(3, 5, (2, 3), stride=2, padding=(1, 2), dilation=(2, 1)), torch.randn(6, 3, 7, 8)
    assert close(norm(layer, [x]), unfolded(x, layer).norm(dim=0)[None])


def test_norms_of_a_grouped_convolution_differ_by_group():
    layer, x = nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(6, 4, 7, 8)
    upper, lower = (unfolded(half, layer).norm(dim=0) for half in x.split(2, dim=1))
    assert close(norm(layer, [x]), torch.stack([upper] * 3 + [lower] * 3))


def test_norms_of_a_one_dimensional_and_a_three_dimensional_convolution():
    line, x = nn.Conv1d(3, 5, 3, stride=2, padding=1), torch.randn(6, 3, 9)
    flat = nn.Conv2d(3, 5, (1, 3), stride=(1, 2), padding=(0, 1))
    assert close(norm(line, [x]), unfolded(x[:, :, None], flat).norm(dim=0)[None])
    cube, x = nn.Conv3d(2, 5, (2, 1, 3)), torch.randn(4, 2, 3, 4, 5)
    taps = [x[:, :, a : a + 2, :, b : b + 3] for a in range(2) for b in range(3)]
    norms = [tap.square().sum((0, 2, 3, 4)).sqrt() for tap in taps]
    assert close(norm(cube, [x]), torch.cat(norms)[None])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_norms_see_the_padded_input(mode):
    layer, x = nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode=mode), torch.randn(6, 3, 7, 8)
    bare = nn.Conv2d(3, 5, 3)
    padded = F.pad(x, (2, 2, 1, 1), mode=mode)
    assert close(norm(layer, [x]), unfolded(padded, bare).norm(dim=0)[None])


def test_calls_by_keyword_and_on_single_examples():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(3, 4, 2), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.stack(
                [self.conv(input=one).mean(1) for one in x]
            )  # [channels, length], without examples
            return self.head(torch.stack([self.linear(one) for one in h]))

    model, x = Calls(), torch.randn(5, 3, 6)
    h = model.conv(x).mean(2).detach()
    taps = torch.stack([x[:, :, :-1], x[:, :, 1:]], dim=1).square().sum((0, 3)).sqrt()
    assert close(norm(model, [x], "conv.weight"), taps.flatten()[None])
    assert close(norm(model, [x], "linear.weight"), h.norm(dim=0)[None])


def test_calls_of_transposed_layers_by_their_own_keyword():
    model, ids = gpt2().eval(), torch.randint(0, 50, (2, 5))
    seen: list[Tensor] = []
    layer = model.transformer.h[1].mlp.c_fc
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(ids)
    handle.remove()
    block = model.transformer.h[1].mlp
    block.forward = lambda h: block.c_proj(block.act(block.c_fc(x=h)))
    found = norm(model, [{"input_ids": ids}], "transformer.h.1.mlp.c_fc.weight")
    assert close(found, seen[0].flatten(0, 1).norm(dim=0)[None])


def test_shared_weights_hear_all_their_calls():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    x = torch.randn(5, 4)
    both = torch.cat([x, model[0](x).detach()])
    assert close(norm(model, [x], "0.weight"), both.norm(dim=0)[None])


def test_norms_of_layers_within_a_transformer_with_a_padding_mask():
    # Without gradients torch runs such a layer as one kernel, on a nested tensor without the padding.
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    model, x = Encoder().eval(), torch.randn(3, 6, 8)
    padding = torch.arange(6) >= torch.tensor([[4], [5], [6]])
    seen: list[Tensor] = []
    layer = model.encoder.layers[1].linear1
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x, padding)  # with gradients, so module by module
    handle.remove()
    where = sc.Where(include="*.linear?")
    found = sc.collect(model, [sc.InputNorm()], [((x, padding), None)], where=where).stats
    assert close(
        found["encoder.layers.1.linear1.weight"][sc.InputNorm()], seen[0].flatten(0, 1).norm(dim=0)[None]
    )
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_checkpointed_layer_is_heard_once():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(lambda h: self.b(self.a(h).tanh()), x, use_reentrant=False))

    model, x, y = Checkpointed(), torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    both = sc.collect(model, [sc.InputNorm(), sc.GradAbs()], [(x, y)], F.cross_entropy)
    assert close(both.stats["a.weight"][sc.InputNorm()], x.norm(dim=0)[None])
    assert not both.notes


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (
            Attention(),
            sc.Where(include="*in_proj*"),
            "attention.in_proj_weight is part of a MultiheadAttention",
        ),
        (
            Attention(),
            sc.Where(include="*out_proj*"),
            "attention.out_proj.weight received no input while measuring",
        ),
        (Recurrent(), None, "lstm.weight_ih_l0 is part of a LSTM: exclude it with where="),
        (nn.ConvTranspose1d(5, 4, 2), None, "weight is part of a ConvTranspose1d"),
    ],
)
def test_layers_without_a_norm_of_their_inputs_are_refused(model, where, message):
    x = torch.randn(2, 5, 7) if isinstance(model, nn.ConvTranspose1d) else torch.randn(2, 3, 6)
    with pytest.raises(sc.StatsError, match=message):
        sc.collect(model, [sc.InputNorm()], [x], where=where)


def test_a_weight_tied_to_an_embedding_has_no_one_norm():
    model = gpt2()
    with pytest.raises(sc.StatsError, match=r"transformer\.wte.weight is part of a Embedding"):
        sc.collect(model, [sc.InputNorm()], [torch.randint(0, 50, (2, 5))], where=sc.Where(also="*.wte"))
