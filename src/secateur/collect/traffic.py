"""The inputs of a layer, and the gradients of its outputs, as matrices.

A linear or convolution layer computes `Y = X W^T` for each of its groups, with one row of `X` for each token
or kernel position. Everything measured of a layer follows from `X` and the gradient of `Y`.
Shapes: G groups, N examples, T tokens or positions of an example, I inputs of a row of W, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.layout import is_hf_conv1d

# Entries of one block of per-example gradients or unfolded inputs: 4 MiB of float32, which caches hold.
BLOCK = 1 << 20

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def understood(module: nn.Module, attribute: str) -> bool:
    """Whether the traffic of this parameter can be read from the module's inputs and outputs."""
    plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_hf_conv1d(module)
    return plain and attribute == "weight"


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one input of a call of such a module, given by position or by its name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x.detach()


def inputs_GNTI(module: nn.Module, x: Tensor) -> Float[Tensor, "G N T I"]:
    """What each row of the weight matrix is multiplied with."""
    if isinstance(module, _CONVOLUTIONS):
        return _patches(module, x)
    return x.reshape(1, x.shape[0], -1, x.shape[-1])


def outputs_GNTO(module: nn.Module, y: Tensor) -> Float[Tensor, "G N T O"]:
    """An output, or its gradient, split like `inputs_GNTI`."""
    if isinstance(module, _CONVOLUTIONS):
        split = y.reshape(y.shape[0], module.groups, -1, y[0, 0].numel())  # N G O T
        return split.permute(1, 0, 3, 2)
    return y.reshape(1, y.shape[0], -1, y.shape[-1])


def with_examples(module: nn.Module, x: Tensor) -> Tensor:
    """An input with a dimension of examples in front, added if the layer was called on a single one."""
    plain = len(module.kernel_size) + 1 if isinstance(module, _CONVOLUTIONS) else 1
    return x[None] if x.dim() == plain else x


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Unfolded input of a convolution, columns in the order of `layout.Convolution`: taps, then channels."""
    dims = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # `_reversed_padding_repeated_twice` is how torch itself resolves "same" and circular padding.
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for d in range(dims):
        reach = (module.kernel_size[d] - 1) * module.dilation[d] + 1
        x = x.unfold(2 + d, reach, module.stride[d])[..., :: module.dilation[d]]
    n, channels = x.shape[:2]
    # N (G C) L... K...  ->  G N (L...) (K... C)
    x = x.reshape(n, module.groups, channels // module.groups, *x.shape[2:])
    places, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    x = x.permute(1, 0, *places, *taps, 2)
    positions = x.shape[2 : 2 + dims].numel()
    return x.reshape(module.groups, n, positions, -1)
