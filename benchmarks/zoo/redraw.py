"""Random weights with which a model's output depends on everything in it.

Default initialisation hides mistakes: a LayerScale of 1e-6, a norm that starts at zero, or activations that
vanish in a deep stack leave the output as it was whatever is removed. `redraw_` draws what hides anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

EMBEDDING_STD = 0.5
BIAS_STD = 0.1
MEAN_STD = 0.4  # of a running mean, relative to the input of the norm
FLOOR = 0.5  # of a running variance, likewise


def redraw_(
    model: nn.Module, generator: torch.Generator, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Draw all weights and BatchNorm statistics anew, in place; outputs are then finite and of order 1.

    Matrices and kernels are normal with the variance 1 / fan-in, embeddings normal, norm weights, LayerScale
    and other vectors uniform in [0.5, 1.5], biases small and normal. Then one forward of `args` and `kwargs`
    divides every layer called as a module by the standard deviation of its output, and gives every BatchNorm
    statistics that suit what it sees.
    """
    with torch.no_grad():
        for owner, name, parameter in _owned(model):
            parameter.copy_(_drawn(owner, name, parameter, generator))
        handles = [h for module in model.modules() for h in _fitted(module, generator)]
        try:
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter of floating type once, with a module that has it and its dotted name."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen and parameter.is_floating_point():
                seen.add(parameter)
                yield module, f"{prefix}.{name}", parameter


def _drawn(owner: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    """Values for one parameter, by the module that has it, its shape, and its name."""
    shape = parameter.shape
    last = name.lower().rsplit(".", 1)[-1]
    normal = torch.randn(shape, generator=generator)
    layer = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd) and last == "weight"
    if isinstance(owner, nn.Embedding):
        return normal * EMBEDDING_STD
    if not layer and parameter.numel() == max(shape, default=1):  # a vector, whatever its shape
        if "bias" in last or "lambda" in last:  # differential attention raises e to products of these
            return normal * BIAS_STD
        if any(word in last for word in ("token", "embed", "pos")):
            return normal * EMBEDDING_STD
        return torch.rand(shape, generator=generator) + 0.5
    if not layer and any(word in last for word in ("token", "embed", "pos", "table", "latents", "bias")):
        return normal * EMBEDDING_STD
    return normal / math.sqrt(_fan_in(owner, parameter))


def _fan_in(owner: nn.Module, parameter: nn.Parameter) -> int:
    """Number of products summed in one output, roughly where the layout is not known."""
    if type(owner).__name__ == "Conv1D":  # transformers' linear layer with the weight [in, out]
        return parameter.shape[0]
    if isinstance(owner, nn.modules.conv._ConvNd):
        return max(1, parameter[0].numel())
    return parameter.shape[-1]


def _fitted(module: nn.Module, generator: torch.Generator) -> list[Any]:
    """Hooks that fit a module to the first input it sees."""
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        return [module.register_forward_pre_hook(lambda m, inputs: _fit_statistics_(m, inputs[0], generator))]
    weight = module._parameters.get("weight")  # not a weight that a parametrisation computes
    is_layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
    if not is_layer or weight is None:
        return []
    seen: list[bool] = []

    def fit(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if (
            seen or not isinstance(output, Tensor) or output.numel() < 2
        ):  # some routers return more than logits
            return None
        spread = float(output.std())
        if not math.isfinite(spread) or spread < 1e-6:
            return None
        seen.append(True)
        weight.div_(spread)
        if module.bias is not None:
            module.bias.div_(spread)
        return output / spread

    return [module.register_forward_hook(fit)]


def _fit_statistics_(norm: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    """Running statistics for the channels of x [batch, channel, ...] that keep its scale, and are random.

    The variance is a channel's mean square, blurred, and the mean is random. Statistics that centre each
    channel would make a deep random network chaotic: rounding errors grow until they hide real ones. A
    channel with few values gets the mean square of all of them.
    """
    flat = x.detach().transpose(0, 1).flatten(1)
    whole = float(flat.square().mean())
    few = flat.shape[1] < 8
    square = torch.full((len(flat),), whole) if few else flat.square().mean(1)
    blur = torch.rand(len(flat), generator=generator) + 0.5
    norm.running_mean.copy_(torch.randn(len(flat), generator=generator) * (MEAN_STD * math.sqrt(whole)))
    norm.running_var.copy_((square + FLOOR * whole) * blur + 1e-6)
