"""How a tiny architecture of transformers is described: its class, its config, and the inputs it takes.

Sizes are chosen so that two axes of different meaning seldom have the same size (hidden 64, intermediate 80,
heads 16, KV heads 4, head dimension 12, vocabulary 112), that half of every axis is an integer, and that half
of the rotary pairs and of the query heads in a group are integers too. Half of an expert's size is a multiple
of 4, since `torch._grouped_mm` refuses rows that are not aligned to 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 112
BATCH = 2
TOKENS = 11

Inputs = dict[str, Any]


def text(generator: torch.Generator, tokens: int = TOKENS) -> Inputs:
    """Token ids [2, tokens], none of them special."""
    return {"input_ids": torch.randint(8, VOCABULARY, (BATCH, tokens), generator=generator)}


def renamed(name: str) -> Callable[[torch.Generator], Inputs]:
    """More ids [2, 11], under another name."""
    return lambda generator: {name: text(generator)["input_ids"]}


def long_text(generator: torch.Generator) -> Inputs:
    """Token ids [2, 32], for attention that is cut into blocks."""
    return text(generator, 32)


def target(generator: torch.Generator) -> Inputs:
    """Token ids [2, 6] of a decoder behind an encoder."""
    return {"decoder_input_ids": text(generator, 6)["input_ids"]}


def pair(generator: torch.Generator) -> Inputs:
    """Source [2, 11] and target [2, 6]."""
    return text(generator) | target(generator)


def long_pair(generator: torch.Generator) -> Inputs:
    """Source [2, 32] and target [2, 6]."""
    return pair(generator) | long_text(generator)


def first_global(generator: torch.Generator) -> Inputs:
    """All tokens attend to the first, and it to all."""
    mask = torch.zeros(BATCH, 32, dtype=torch.long)
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


def normal(name: str, *shape: int) -> Callable[[torch.Generator], Inputs]:
    """One input of normal values, [2, *shape]."""

    def draw(generator: torch.Generator) -> Inputs:
        return {name: torch.randn(BATCH, *shape, generator=generator)}

    return draw


def image(size: int) -> Callable[[torch.Generator], Inputs]:
    """Pictures [2, 3, size, size]."""
    return normal("pixel_values", 3, size, size)


def together(*parts: Callable[[torch.Generator], Inputs]) -> Callable[[torch.Generator], Inputs]:
    """Several inputs."""

    def draw(generator: torch.Generator) -> Inputs:
        return {name: value for part in parts for name, value in part(generator).items()}

    return draw


def fixed(**values: Any) -> Callable[[torch.Generator], Inputs]:
    """Inputs that are not drawn."""
    return lambda generator: dict(values)


@dataclass(frozen=True)
class Tiny:
    """An architecture: `model` is a class of transformers, `config` the settings of its config class."""

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[torch.Generator], Inputs] = text


def tiny(
    model: str, *settings: Mapping[str, Any], inputs: Callable[[torch.Generator], Inputs] = text, **more: Any
) -> Tiny:
    """`Tiny` with settings merged from left to right."""
    merged: dict[str, Any] = {}
    for part in (*settings, more):
        merged |= part
    return Tiny(model, merged, inputs)
