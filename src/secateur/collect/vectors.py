"""Gradients of biases and of norms' weights for single examples.

A layer is affine in such a vector: its derivative is the layer's output with ones in its place less that with
zeros. Where that is not so, the comparison with the definition in `examples` shows it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_CHANNELS_SECOND = (_NormBase, _ConvNd, nn.GroupNorm, nn.PReLU)


def is_vector(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter may act on each channel, or last dimension, of what its module returns."""
    p = module._parameters.get(attribute)
    if p is None or next(module.children(), None) is not None:
        return False
    return p.dim() == 1 or isinstance(module, nn.LayerNorm)


def vector_gradients(
    module: nn.Module, attribute: str, x: Float[Tensor, "n *input"], g: Float[Tensor, "n *output"]
) -> Float[Tensor, "n size"]:
    """The gradient of a vector for each example, flat, from a call's input and its output's gradient."""
    p = module._parameters[attribute]
    assert p is not None
    if attribute != "bias":
        with torch.no_grad():
            ones, zeros = (
                functional_call(module, {attribute: f(p)}, (x,)) for f in (torch.ones_like, torch.zeros_like)
            )
        g = g * (ones - zeros)
    if p.numel() == 1:
        return g.flatten(1).sum(1, keepdim=True, dtype=torch.float32)
    kept = [1] if isinstance(module, _CHANNELS_SECOND) else list(range(g.dim() - p.dim(), g.dim()))
    summed = [d for d in range(1, g.dim()) if d not in kept]
    return (g.float().sum(summed) if summed else g.float()).flatten(1)
