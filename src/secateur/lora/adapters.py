"""The masked weights of a `peft` model, with the LoRA layers on them: found and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.core.bulk import zero_
from secateur.core.errors import MaskError, SecateurError
from secateur.masks import Masks


class LoraError(SecateurError):
    """A model without LoRA adapters, or with adapters that cannot be held or merged under masks."""


@dataclass(frozen=True, eq=False)
class Masked:
    """A weight of the base model that a mask covers.

    Attributes:
        name: in the base model.
        parameter: the weight.
        keep: its mask, in the weight's shape.
        layer: peft's LoRA layer on it, None if there is none.
    """

    name: str
    parameter: Tensor
    keep: Tensor
    layer: Any | None


def masked_weights(model: nn.Module, masks: Masks) -> list[Masked]:
    """What the masks cover; raises `LoraError` and `MaskError` as `merge_lora_` says."""
    base, layers = lora_layers(model)
    found = []
    for name, keep in masks.items():
        parameter = _parameter(base, name)
        if parameter.shape != keep.shape:
            raise MaskError(f"{name} has shape {tuple(parameter.shape)}, its mask {tuple(keep.shape)}.")
        found.append(Masked(name, parameter, keep, layers.get(name)))
    for name, layer in layers.items():
        _refuse(name, layer)
    for weight in found:
        _refuse_under_mask(weight)
    return found


def lora_layers(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The base model inside a `PeftModel`, and its LoRA layers by the names of the weights under them."""
    try:
        from peft import LoraModel, PeftModel
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise LoraError("LoRA adapters are those of peft: pip install 'secateur[peft]'.") from None
    if not isinstance(model, PeftModel):
        raise LoraError(f"LoRA adapters are those of a PeftModel; got {type(model).__name__}.")
    if not isinstance(model.base_model, LoraModel):
        raise LoraError(
            f"The adapters of the model are those of {type(model.base_model).__name__}, not LoRA's."
        )
    base = model.base_model.model
    layers = {f"{n}.weight": module for n, module in base.named_modules() if isinstance(module, LoraLayer)}
    return base, layers


def active(layer: Any) -> list[str]:
    """Names of the adapters that a LoRA layer computes with."""
    return [adapter for adapter in layer.active_adapters if adapter in layer.scaling]


def apply_(weights: Sequence[Masked]) -> None:
    """Zero what the masks remove in the base weights."""
    for weight in weights:
        zero_(weight.parameter, weight.keep.to(weight.parameter.device))


def _parameter(base: nn.Module, name: str) -> nn.Parameter:
    """The base model's parameter, wherever peft has moved it."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    *path, attribute = name.split(".")
    module: Any = base
    for i, part in enumerate(path):
        module = getattr(module, part, None)
        here = ".".join(path[: i + 1])
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise LoraError(
                f"peft trains a copy of {here} as a whole, zeros and all: leave it out of modules_to_save, "
                f"or {name} out of the masks."
            )
        if isinstance(module, BaseTunerLayer):
            if type(module) is not Linear or i + 1 < len(path):
                raise LoraError(
                    f"The adapter on {here} is peft's {type(module).__name__}, which cannot be merged under "
                    f"a mask, only those on plain linear layers and Conv1D: leave {name} out of the masks."
                )
            module = module.get_base_layer()
    parameter: nn.Parameter | None = getattr(module, "_parameters", {}).get(attribute)
    if parameter is None:
        raise MaskError(f"The base model has no parameter {name}, which the masks cover.")
    return parameter


def _refuse(name: str, layer: Any) -> None:
    """What peft would refuse in the middle of a merge."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    for adapter in layer.scaling if type(layer) is Linear else ():
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            raise LoraError(
                f"The adapter {adapter} of {name} is peft's {type(variant).__name__}: only plain LoRA and "
                "DoRA can be merged under masks."
            )
        if layer.lora_bias[adapter] and getattr(layer.get_base_layer(), "bias", None) is None:
            raise LoraError(
                f"The adapter {adapter} of {name} has a bias, lora_bias=True, but the layer has none to "
                "merge it into."
            )


def _refuse_under_mask(weight: Masked) -> None:
    layer = weight.layer
    if layer is None:
        return
    if layer.merged:
        raise LoraError(f"Adapters are merged into {weight.name} already: call unmerge_adapter() first.")
    rows = weight.keep.any(0 if layer.fan_in_fan_out else 1)
    if layer.lora_variant and not bool(rows.all()):
        raise LoraError(
            f"DoRA divides by the norms of the rows of {weight.name}, one of which has no weight left: use "
            "plain LoRA, or leave the layer out of target_modules."
        )
