"""Reading the traffic of a group where its consumers take it in.

A *consumer* is a linear or convolution layer whose weight holds the group's axis in its input dimension (role
`in`). A forward hook sees its input; the unit of each input channel follows from the labels.
Shapes: N examples, T tokens or positions of an example, I input channels, U units of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.collect.batches import Batches, as_batches
from secateur.core.errors import StatsError
from secateur.core.layout import is_hf_conv1d
from secateur.core.modes import evaluation, unfused
from secateur.scoring.base import Group, Labels, Place, places

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Consumer:
    """Where a group's traffic is read: the weight that takes it in, and the unit of each input channel."""

    tensor: str
    weight: Tensor
    labels: Tensor


def consumers(
    model: nn.Module, group: Group, labels: Labels, who: object
) -> tuple[list[Consumer], list[str]]:
    """The layers at which a group can be measured, and a note on those where it cannot."""
    found, left = [], []
    for place in places(model, group, labels, "in"):
        if input_dim(place.target.module, place.target.attribute) == place.dim:
            found.append(Consumer(place.tensor, place.weight, _channel_labels(place)))
        else:
            left.append(place.tensor)
    why = "traffic is read at linear and convolution layers only"
    notes = [f"Left out, because {why}: {', '.join(left)}."] if left else []
    if not found:
        raise StatsError(
            f"{who} reads the traffic of {group.name} at the layers that take it in, and it has none that is "
            f"a linear or convolution module. {' '.join([*notes, 'Use'])} GroupScore(Taylor()) or "
            "GroupScore(Magnitude()), or exclude the group."
        )
    return found, notes


def input_dim(module: nn.Module, attribute: str) -> int | None:
    """The dimension of a weight that its module's input channels index, if the input can be read."""
    if attribute != "weight":
        return None
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return 1
    return 0 if isinstance(module, _TRANSPOSED) or is_hf_conv1d(module) else None


def _channel_labels(place: Place) -> Tensor:
    """Units of all input channels: the weight of a grouped convolution holds those of one of its groups."""
    module = place.target.module
    return place.labels.repeat(module.groups) if isinstance(module, _CONVOLUTIONS) else place.labels


def tokens_NTI(module: nn.Module, x: Tensor) -> Float[Tensor, "N T I"]:
    """An input with one row for each token or position, channels last."""
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        x = x[None] if x.dim() == len(module.kernel_size) + 1 else x
        return x.flatten(2).transpose(1, 2)
    x = x[None] if x.dim() == 1 else x
    return x.reshape(x.shape[0], -1, x.shape[-1])


Hear = Callable[[int, nn.Module, Tensor], Tensor | None]
"""Called with the id of a weight, its module and the input; may put another input in its place."""


@contextmanager
def listening(model: nn.Module, weights: Iterable[Tensor], hear: Hear) -> Iterator[None]:
    """While this holds, every call of a layer with one of these weights is heard."""
    wanted = {id(w) for w in weights}
    handles = []
    try:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if id(weight) in wanted and input_dim(module, "weight") is not None:
                hook = partial(_intercept, id(weight), hear)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _intercept(weight: int, hear: Hear, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Hand the one input, given by position or by name, to `hear`."""
    name = None if args else next(iter(kwargs))
    x = args[0] if name is None else kwargs[name]
    instead = hear(weight, module, x)
    if instead is None:
        return args, kwargs
    return ((instead, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: instead})


def data(model: nn.Module, batches: Iterable[Any] | None, who: object) -> Batches:
    """Batches that can be read again, on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return as_batches(batches, device, f"{who} must be measured on data")


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, kernels that hooks can see into, and torch's random state put back afterwards."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with evaluation(model), unfused(), torch.random.fork_rng([*devices]):
        yield


def read_channels(
    model: nn.Module,
    weights: Sequence[Tensor],
    batches: Batches,
    measure: Callable[[Float[Tensor, "T I"]], Tensor],
) -> dict[int, tuple[Tensor, int]]:
    """For each weight by id, the sum of `measure(tokens)` over all calls, float64 `[I]`, and the tokens."""
    sums: dict[int, tuple[Tensor, int]] = {}

    def hear(weight: int, module: nn.Module, x: Tensor) -> None:
        tokens = tokens_NTI(module, x.detach()).flatten(0, 1)
        total, count = sums.get(weight, (0, 0))
        sums[weight] = (total + measure(tokens).double(), count + len(tokens))

    with torch.no_grad(), measuring(model), listening(model, weights, hear):
        for batch in batches:
            batch.forward(model)
    return sums


def called_weights(model: nn.Module, batches: Iterable[Any] | None) -> set[int]:
    """Ids of the weights whose layers are called on this data."""
    weights = list(model.parameters())
    read = read_channels(model, weights, data(model, batches, "The input of a layer"), lambda x: x[:0].sum(0))
    return set(read)
