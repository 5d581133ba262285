"""Tiny architectures of transformers, built from configs: nothing is downloaded, nothing is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.tiny import Tiny
from benchmarks.zoo.transformers_audio import AUDIO
from benchmarks.zoo.transformers_decoders import DECODERS
from benchmarks.zoo.transformers_encoders import ENCODERS
from benchmarks.zoo.transformers_mixtures import MIXTURES
from benchmarks.zoo.transformers_pairs import ENCODER_DECODERS
from benchmarks.zoo.transformers_vision import VISION

GROUPS: dict[str, dict[str, Tiny]] = {
    "decoders": DECODERS | MIXTURES,
    "encoders": ENCODERS,
    "encoder-decoders": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
}
ALL: dict[str, Tiny] = {name: tiny for group in GROUPS.values() for name, tiny in group.items()}
NAMES = tuple(ALL)


def create(name: str, generator: torch.Generator) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model in evaluation mode, and its inputs by name."""
    import transformers

    entry = ALL[name]
    model_class = getattr(transformers, entry.model)
    config = model_class.config_class(**entry.config)
    return model_class(config).eval(), (), entry.inputs(generator)
