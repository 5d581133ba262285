"""Models to try structured pruning on: torchvision, one of each family of timm, tiny transformers.

    model, args, kwargs = build("transformers/llama")
    model(*args, **kwargs)

`build` is deterministic: weights and inputs come from a seed made of the name. Weights are random, and such
that the output depends on everything in the model (`redraw.py`). Nothing is downloaded.

torchvision and timm are installed apart from the other packages; `operators.py` says why, and
requirements.txt how.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import timm_models, torchvision_models, transformers_models
from benchmarks.zoo.operators import available
from benchmarks.zoo.redraw import redraw_

__all__ = ["FAMILIES", "SUBSET", "available", "build", "names", "redraw_", "seed_of", "tensors"]

FAMILIES: dict[str, ModuleType] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}
_SUBSET = (
    "torchvision: resnet18 densenet121 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5",
    "torchvision: efficientnet_b0 regnet_y_400mf convnext_tiny swin_t lraspp_mobilenet_v3_large",
    "timm: ghostnet_050 hgnetv2_b0 xcit_nano_12_p8_224 test_vit_relpos mobilevit_s pvt_v2_b0",
    "transformers: llama gemma3 qwen3 phi3 gpt2 gpt_neox falcon mixtral deepseek_v3 gpt_oss mamba2 jamba",
    "transformers: bert deberta_v2 modernbert t5 bart whisper vit swinv2 resnet wav2vec2 clip",
)
SUBSET = tuple(f"{line.split(': ')[0]}/{name}" for line in _SUBSET for name in line.split(": ")[1].split())
"""Forty names, a mix of everything that builds quickly: what the tests try."""


def names(family: str | None = None) -> tuple[str, ...]:
    """Every name that `build` takes, or those of one family."""
    chosen = FAMILIES if family is None else {family: FAMILIES[family]}
    return tuple(f"{key}/{name}" for key, module in chosen.items() for name in module.NAMES)


def seed_of(name: str) -> int:
    """A seed that follows from the name, the same on every machine."""
    return zlib.crc32(name.encode())


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, whatever they are nested in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return []
    return [t for part in output for t in tensors(part)]


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model in evaluation mode, and the arguments of a forward, by position and by name.

    Raises:
        KeyError: no such family.
        ModuleNotFoundError: torchvision is not installed, and the model needs it.
    """
    family, _, key = name.partition("/")
    generator = torch.Generator().manual_seed(seed_of(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(name))  # constructors draw from the global generator
        model, args, kwargs = FAMILIES[family].create(key, generator)
    redraw_(model, generator, args, kwargs)
    return model, args, kwargs
