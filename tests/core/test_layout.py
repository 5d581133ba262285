"""A weight as a matrix: there and back, and each row really makes one output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.collect.traffic import inputs_GNTI, outputs_GNTO
from secateur.core.layout import (
    Convolution,
    Plain,
    Transposed,
    TransposedConvolution,
    layout_of,
    matrix_shape,
)

# name: module, shape of an input, shape [out, in] of the matrix, inputs that lie side by side
FORWARD = {
    "linear": (nn.Linear(6, 4), (3, 5, 6), (4, 6), 6),
    "hf conv1d": (Conv1D(4, 6), (3, 5, 6), (4, 6), 6),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 11), (6, 12), 4),
    "conv2d": (nn.Conv2d(4, 6, (3, 2)), (3, 4, 8, 7), (6, 24), 4),
    "conv3d": (nn.Conv3d(2, 5, (1, 2, 3)), (3, 2, 4, 5, 6), (5, 12), 2),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=2, dilation=2), (3, 6, 8, 8), (4, 27), 3),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4), (3, 4, 9), (8, 3), 1),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5), (3, 18), 2),
    "same": (nn.Conv1d(2, 3, 5, padding="same"), (2, 2, 9), (3, 10), 2),
}
# ... and constructor arguments of transposed convolutions
BACKWARD = {
    "convT1d": (nn.ConvTranspose1d, dict(in_channels=4, out_channels=6, kernel_size=3), (6, 12), 4),
    "convT2d": (nn.ConvTranspose2d, dict(in_channels=4, out_channels=6, kernel_size=(3, 2)), (6, 24), 4),
    "convT3d": (nn.ConvTranspose3d, dict(in_channels=2, out_channels=3, kernel_size=(1, 2, 3)), (3, 12), 2),
    "strided": (nn.ConvTranspose2d, dict(in_channels=2, out_channels=3, kernel_size=3, stride=2), (3, 18), 2),
    "dilated": (
        nn.ConvTranspose1d,
        dict(in_channels=3, out_channels=2, kernel_size=3, dilation=2),
        (2, 9),
        3,
    ),
    "grouped": (nn.ConvTranspose2d, dict(in_channels=6, out_channels=4, kernel_size=2, groups=2), (4, 12), 3),
}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module


def test_each_module_has_its_layout():
    assert layout_of(nn.Linear(2, 3), "weight") == Plain()
    assert layout_of(Conv1D(3, 2), "weight") == Transposed()
    assert layout_of(nn.Conv3d(2, 3, 1), "weight") == Convolution()
    assert layout_of(nn.ConvTranspose1d(4, 6, 1, groups=2), "weight") == TransposedConvolution(groups=2)
    # Only the weight of a convolution is one.
    assert layout_of(nn.ConvTranspose1d(4, 6, 1, groups=2), "bias") == Plain()

    class Conv1dOfSomebodyElse(nn.Module):
        pass

    Conv1dOfSomebodyElse.__name__ = "Conv1D"
    assert layout_of(Conv1dOfSomebodyElse(), "weight") == Plain()


def every_module():
    for name, (module, _, shape, run) in FORWARD.items():
        yield pytest.param(module, shape, run, id=name)
    for name, (make, arguments, shape, run) in BACKWARD.items():
        yield pytest.param(make(**arguments), shape, run, id=f"transposed {name}")


@pytest.mark.parametrize(("module", "shape", "run"), list(every_module()))
def test_there_and_back(module, shape, run):
    layout = layout_of(module, "weight")
    stored = module.weight.shape
    weight = torch.arange(float(stored.numel())).view(stored)
    matrix = layout.matrix(weight)
    assert matrix.shape == shape == matrix_shape(layout, stored)
    assert layout.run(stored) == run
    assert sorted(matrix.reshape(-1).tolist()) == weight.view(-1).tolist()  # every entry once
    back = layout.restore(matrix.contiguous(), stored)
    assert torch.equal(back, weight)
    assert back.is_contiguous()
    mask = matrix > matrix.mean()
    assert torch.equal(layout.restore(mask, stored), weight > weight.mean())


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_other_parameters_are_rows_of_their_last_dimension(shape):
    weight = torch.randn(shape)
    matrix = Plain().matrix(weight)
    assert matrix.shape == matrix_shape(Plain(), weight.shape)
    assert matrix.shape[1] == Plain().run(weight.shape) == (shape[-1] if shape else 1)
    assert torch.equal(Plain().restore(matrix, weight.shape), weight)


def test_a_stack_of_experts_is_a_matrix_of_all_their_rows():
    stack = torch.randn(3, 4, 5)
    assert torch.equal(Plain().matrix(stack), torch.cat(list(stack)))


@pytest.mark.parametrize("name", FORWARD)
def test_a_row_times_what_it_sees_is_its_output(name):
    module, shape, _, _ = FORWARD[name]
    module = randomised(module).double()
    x = torch.randn(shape, dtype=torch.float64)
    matrix = layout_of(module, "weight").matrix(module.weight)
    inputs = inputs_GNTI(module, x)
    rows = matrix.view(inputs.shape[0], -1, matrix.shape[1])
    outputs = torch.einsum("goi,gnti->gnto", rows, inputs)
    bias = module.bias.view(inputs.shape[0], 1, 1, -1)
    torch.testing.assert_close(outputs + bias, outputs_GNTO(module, module(x)))


@pytest.mark.parametrize("name", BACKWARD)
def test_a_row_of_a_transposed_convolution_is_a_filter_of_the_equivalent_convolution(name):
    make, arguments, _, _ = BACKWARD[name]
    module = randomised(make(**arguments)).double()
    dims = len(module.kernel_size)
    x = torch.randn(2, arguments["in_channels"], *(5,) * dims, dtype=torch.float64)
    matrix = layout_of(module, "weight").matrix(module.weight)
    kernel = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    filters = Convolution().restore(matrix, torch.Size(kernel)).flip(tuple(range(2, 2 + dims)))
    # A transposed convolution is a plain one over inputs spread apart by the stride, kernel reversed.
    spread = torch.zeros(
        2, x.shape[1], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True))
    )
    spread = spread.double()
    spread[(..., *(slice(None, None, s) for s in module.stride))] = x
    padding = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    out = CONV[dims](spread, filters, module.bias, 1, padding, module.dilation, module.groups)
    torch.testing.assert_close(out, module(x))


def test_removing_a_row_silences_one_output_of_a_transposed_convolution():
    module = randomised(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False))
    layout = layout_of(module, "weight")
    x = torch.randn(1, 6, 4, 4)
    for row in range(4):
        matrix = layout.matrix(module.weight.detach()).clone()
        matrix[row] = 0
        silenced = F.conv_transpose2d(x, layout.restore(matrix, module.weight.shape), groups=2)
        silent = (silenced == 0).all(dim=3).all(dim=2)[0]
        assert silent.tolist() == [i == row for i in range(4)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_matrix_of_a_convolution_does_not_depend_on_its_storage(memory_format):
    module = nn.Conv2d(4, 6, 3)
    expected = Convolution().matrix(module.weight).clone()
    assert torch.equal(Convolution().matrix(module.to(memory_format=memory_format).weight), expected)
