"""Calibration data that a language model writes itself, where there is no text of the right kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.artifacts.tensors import first_line
from secateur.cli.data.arguments import vocabulary
from secateur.cli.data.batches import Data, next_token, of_tokens
from secateur.cli.data.windows import Cut
from secateur.core.errors import SecateurError
from secateur.core.modes import evaluation
from secateur.progress import track

SELF = Path("self")  # what stands for a data file
_BATCH = 16


def own_text(model: Any, task: str, cut: Cut) -> Data:
    """`cut.samples` texts of `cut.length` tokens, drawn from the model's own distribution with `cut.seed`.

    Each begins with the model's beginning-of-text token, and every further token is drawn from all of the
    vocabulary with the model's probabilities (temperature 1). A text that ends is not cut off: the
    end-of-text token is a token like any other, and what the model writes after it follows. A model without a
    beginning-of-text token begins with a token drawn evenly from the vocabulary.

    Sources: Williams et al. 2024 (self-calibration: from the beginning-of-text token); Liu et al. 2023
    (LLM-QAT: from a random token, the full distribution afterwards). Differs from the papers: no schedule of
    temperatures, no first tokens chosen greedily.
    """
    size = vocabulary(model)
    if task != "text-generation" or not model.can_generate() or size is None:
        raise SecateurError(
            f"Only a language model can write its own calibration data, and this is one for {task}: "
            "give --data a file."
        )
    assert cut.samples is not None  # there is no end to what a model can write
    samples, seed = cut.samples, cut.seed or 0
    bos = _beginning(model)
    first = (
        torch.full((samples, 1), bos)
        if bos is not None
        else torch.randint(size, (samples, 1), generator=cut.generator())
    )
    ids = _written(model, first, cut.length, seed)
    start = f"its beginning-of-text token {bos}" if bos is not None else "random tokens"
    note = (
        f"The data was written by the model itself: {samples} texts of {cut.length} tokens from {start}, "
        f"temperature 1, seed {seed}."
    )
    return Data([of_tokens(part) for part in ids.split(4)], next_token, (note,))


def _beginning(model: Any) -> int | None:
    for config in (model.generation_config, model.config):
        bos = getattr(config, "bos_token_id", None)
        if isinstance(bos, int):
            return bos
    return None


@torch.no_grad()
def _written(model: Any, first: Tensor, length: int, seed: int) -> Tensor:
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # `generate` takes no generator.
        with evaluation(model), _full_distribution(model, length), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            parts = [
                model.generate(**of_tokens(part.to(model.device))).cpu()
                for part in track(first.split(_BATCH), "writing calibration data")
            ]
    except RuntimeError as error:
        raise SecateurError(f"The model cannot write its own calibration data: {first_line(error)}") from None
    return torch.cat(parts)


@contextmanager
def _full_distribution(model: Any, length: int) -> Iterator[None]:
    """Draw from all tokens and never stop; `generate` fills what it is not told from the model's settings."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = kept
