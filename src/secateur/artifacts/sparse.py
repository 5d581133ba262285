"""Layers of a model that compute with packed weights, as a step of its surgery: data, checked, never run.

The packed buffers lie with the other tensors of the model. The step says which layers they belong to, so that
loading builds these layers without their dense weights. Plans are derived data: they are made anew.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ArtifactError
from secateur.runtime import native
from secateur.runtime.compress import candidate
from secateur.runtime.formats import Packed
from secateur.runtime.formats.common import TAIL
from secateur.runtime.linear import NEVER, SparseConv1x1, SparseLinear
from secateur.runtime.ops import check_bias, packed_of
from secateur.runtime.plan import Plan

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int64)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PLANS = ("none", "columns", "pairs")
_ROOM = 8  # entries of a buffer, over those of the weight: columns are padded to whole groups
_FIELDS = ("shape", "group", "buffers", "bias", "stride", "plan", "switch")


@dataclass(frozen=True)
class Sparse:
    """Which layers are sparse, in what format, and the kernels that they were measured with.

    `layers` has, by name: "shape" (outputs, inputs), "group" of the format, "buffers" (type and sizes by
    name), "bias" (bool), "stride" (of a convolution, or None), "plan" ("none", "columns" or "pairs") and
    "switch" (tokens).
    """

    kernels: str
    layers: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> Sparse | None:
        """The sparse layers of a model; None if it has none."""
        found = {n: _described(n, m) for n, m in model.named_modules() if isinstance(m, SparseLinear)}
        return cls(native.kernels(), found) if found else None

    @classmethod
    def from_dict(cls, data: Any) -> Sparse:
        """From `to_dict`; `ArtifactError` unless it is what that gives."""
        if not isinstance(data, dict) or not isinstance(data.get("kernels"), str):
            raise _damaged("it does not say for which kernels")
        layers = data.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise _damaged("it names no layers")
        for name, layer in layers.items():
            if not isinstance(layer, dict) or layer.keys() != set(_FIELDS) or not _is_sound(layer):
                raise _damaged(f"what it says of {name[:100]!r} is not")
        return cls(data["kernels"], layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kernels": self.kernels, "layers": {n: dict(layer) for n, layer in self.layers.items()}}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ArtifactError` unless kernels can read the tensors that were saved for these layers."""
        for name, layer in self.layers.items():
            if all(f"{name}.{b}" in tensors for b in layer["buffers"]):  # what is missing is said elsewhere
                _packed(layer, [tensors[f"{name}.{b}"] for b in layer["buffers"]]).check(name)
            if layer["bias"] and f"{name}.bias" in tensors:
                check_bias(tensors[f"{name}.bias"], layer["shape"][0], name)


def sparsify_(model: nn.Module, step: Sparse) -> Callable[[], None]:
    """Put sparse layers, whose buffers have no values yet, into the places of the dense ones.

    Returns a function that takes it back; raises `ArtifactError`, the model unchanged, if a layer is missing,
    or is of another kind or shape.
    """
    new: list[tuple[nn.Module, str, nn.Module, SparseLinear]] = []
    for name, layer in step.layers.items():
        parent, _, child = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            old = owner.get_submodule(child) if child else None
        except AttributeError:
            old = None
        found = None if old is None else candidate(name, old)
        if old is None or found is None:
            raise ArtifactError(f"{name} is no layer of the model that could be sparse.")
        if tuple(found.weight.shape) != tuple(layer["shape"]) or _stride(found.stride) != layer["stride"]:
            raise ArtifactError(f"{name} is {tuple(found.weight.shape)}, not {tuple(layer['shape'])}.")
        new.append((owner, child, old, _empty(layer, found.weight.device).train(old.training)))
    for owner, child, _, sparse in new:
        setattr(owner, child, sparse)

    def undo() -> None:
        for owner, child, old, _ in new:
            setattr(owner, child, old)

    return undo


def ready_(model: nn.Module, step: Sparse) -> None:
    """Make the plans of the layers, now that they have their values; warn if other kernels run them."""
    here = native.kernels()
    if here != step.kernels:
        warnings.warn(
            f"The layers were made sparse where kernels {step.kernels} run; here {here} do, for which "
            "nothing was measured: `secateur.runtime.compress` the pruned model here to know what is faster.",
            stacklevel=5,  # the caller of load, or load
        )
    for name, layer in step.layers.items():
        sparse = model.get_submodule(name)
        assert isinstance(sparse, SparseLinear)
        packed = sparse.packed
        if layer["plan"] != "none" and native.library() is not None and packed.values.device.type == "cpu":
            sparse.set_plan(Plan.of(packed, layer["plan"] == "pairs" and native.pairs()))


def _described(name: str, layer: SparseLinear) -> dict[str, Any]:
    if not name:
        raise ArtifactError(f"The model is a single {type(layer).__name__}: put it into a module.")
    buffers = {b: [_NAMES[t.dtype], list(t.shape)] for b, t in layer.packed.buffers().items()}
    return {
        "shape": [layer.out_features, layer.in_features],
        "group": layer.group,
        "buffers": buffers,
        "bias": layer.bias is not None,
        "stride": list(layer.stride) if isinstance(layer, SparseConv1x1) else None,
        "plan": "none" if layer.plan is None else "pairs" if layer.plan.pairs else "columns",
        "switch": layer.switch,
    }


def _is_sound(layer: Mapping[str, Any]) -> bool:
    shape, buffers, stride = layer["shape"], layer["buffers"], layer["stride"]
    if not _are_counts(shape) or len(shape) != 2 or not all(shape) or not isinstance(buffers, dict):
        return False
    if stride is not None and not (_are_counts(stride) and len(stride) == 2 and all(stride)):
        return False
    if type(layer["bias"]) is not bool or layer["plan"] not in _PLANS:
        return False
    if not _are_counts([layer["group"], layer["switch"]]) or layer["switch"] > NEVER:
        return False
    # No buffer of any format is larger: who names a small layer gets no large memory.
    most = _ROOM * (math.prod(shape) + 256 * sum(shape) + TAIL) + 2**16
    return all(_is_buffer(b, most) for b in buffers.values())


def _is_buffer(buffer: Any, most: int) -> bool:
    if not isinstance(buffer, list) or len(buffer) != 2 or not isinstance(buffer[0], str):
        return False
    dtype, shape = buffer
    return dtype in _DTYPES and _are_counts(shape) and len(shape) <= 2 and math.prod(shape) <= most


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _empty(layer: Mapping[str, Any], device: torch.device) -> SparseLinear:
    """A layer whose buffers have no values yet."""
    buffers = [
        torch.zeros(shape, dtype=_DTYPES[dtype], device=device) for dtype, shape in layer["buffers"].values()
    ]
    packed = _packed(layer, buffers)
    if tuple(packed.buffers()) != tuple(layer["buffers"]):
        raise _damaged(f"its buffers are {', '.join(layer['buffers'])}")
    bias = torch.zeros(layer["shape"][0], device=device) if layer["bias"] else None
    if layer["stride"] is None:
        return SparseLinear(packed, bias, None, layer["switch"])
    stride = (layer["stride"][0], layer["stride"][1])
    return SparseConv1x1(packed, bias, None, layer["switch"], stride)


def _packed(layer: Mapping[str, Any], buffers: list[Tensor]) -> Packed:
    rows, columns = layer["shape"]
    return packed_of(buffers, rows, columns, layer["group"])


def _stride(stride: tuple[int, int] | None) -> list[int] | None:
    return None if stride is None else list(stride)


def _damaged(why: str) -> ArtifactError:
    return ArtifactError(f"The record of sparse layers is damaged: {why}.")
