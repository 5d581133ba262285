"""Which weights can be reconstructed: those of layers whose input a hook sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.collect.traffic import understood
from secateur.core.errors import SelectionError
from secateur.core.layout import Layout, Transposed, layout_of, matrix_shape
from secateur.core.names import unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Consumer:
    """A linear or convolution layer, by the state-dict name of its weight.

    Attributes:
        name: of the weight.
        bias: name of the bias, None if the layer has none.
        layout: how the weight is seen as a matrix `[out, inputs]`; a convolution has one input for each tap
            of each channel.
        features: input features: what a mask has one entry for; channels of a convolution.
        inputs: columns of the matrix.
        holders: names of the modules that hold the weight.
        geometry: two consumers of one tensor have the same inputs if this is equal.
        stack: name of the parameter that holds the weight as one of several experts, None if it is whole.
        expert: its number there.
    """

    name: str
    bias: str | None
    layout: Layout = field(repr=False)
    features: int
    inputs: int
    holders: tuple[str, ...] = field(repr=False)
    geometry: tuple[Any, ...] = field(repr=False)
    stack: str | None = None
    expert: int = 0

    @property
    def parameter(self) -> str:
        """Name of the parameter that holds the weight."""
        return self.stack or self.name

    @property
    def input_dim(self) -> int:
        """The dimension of the stored weight that its input features index."""
        return 0 if isinstance(self.layout, Transposed) else 1


def consumers_of(model: nn.Module, names: Iterable[str]) -> tuple[tuple[Consumer, ...], dict[str, str]]:
    """The weights that can be reconstructed, and for each of the others the reason why not.

    Left out are grouped convolutions, transposed ones, weights that no hook sees at work (stacks of experts,
    raw parameters), and ties to anything else than a layer of the same kind.

    Raises `SelectionError` for a name that is not a parameter of the model.
    """
    model = unwrap(model)
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((path, module, attribute))
    found: dict[int, Consumer] = {}
    reasons: dict[str, str] = {}
    for name in names:
        weight = _parameter(model, name)
        if id(weight) in found:
            reasons[name] = f"the same tensor as {found[id(weight)].name}, which is repaired"
            continue
        reason = _refusal(holders[id(weight)], holders)
        if reason:
            reasons[name] = reason
        else:
            found[id(weight)] = _consumer(name, weight, holders[id(weight)])
    return tuple(found.values()), reasons


def _parameter(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    try:
        weight = model.get_submodule(path)._parameters.get(attribute)
    except AttributeError:
        weight = None
    if weight is None:
        raise SelectionError(f"There is no parameter {name} in the model: names are those of its state dict.")
    return weight


def _refusal(here: list[tuple[str, nn.Module, str]], holders: dict[int, list[Any]]) -> str | None:
    """Why a weight with these holders cannot be reconstructed."""
    for path, module, attribute in here:
        kind = type(module).__name__
        if isinstance(module, _TRANSPOSED):
            return "a transposed convolution"
        if not understood(module, attribute):
            tied = f"tied to {path}.{attribute}, " if len(here) > 1 else ""
            return f"{tied}a raw parameter of {kind}, whose input no hook sees"
        if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
            return "a grouped convolution: each output sees the inputs of its own group only"
    biases = {id(module._parameters.get("bias")) for _, module, _ in here}
    if len(biases) > 1:
        return f"tied between {' and '.join(path for path, _, _ in here)}, which differ in their bias"
    bias = here[0][1]._parameters.get("bias")
    if bias is not None and len(holders[id(bias)]) != len(here):
        return "its bias is tied to that of another layer"
    return None


def _consumer(name: str, weight: Tensor, here: list[tuple[str, nn.Module, str]]) -> Consumer:
    path, module, attribute = here[0]
    layout = layout_of(module, attribute)
    inputs = matrix_shape(layout, weight.shape)[1]
    geometry: tuple[Any, ...] = (inputs,)
    if len(here) > 1:
        geometry = (inputs, name)  # its inputs are those of several modules: of no other consumer
    elif isinstance(module, _CONVOLUTIONS):
        keys = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = (inputs, *(getattr(module, key) for key in keys))
    has_bias = module._parameters.get("bias") is not None
    return Consumer(
        name,
        f"{path}.bias".lstrip(".") if has_bias else None,
        layout,
        layout.run(weight.shape),
        inputs,
        tuple(path for path, _, _ in here),
        geometry,
    )
