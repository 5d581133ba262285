"""Batches for a model, the losses of the common tasks, and a plausible input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import SecateurError

IGNORED = -100  # label of positions that do not count
_MASKED_SHARE = 0.15  # of the tokens, as BERT was trained


@dataclass(frozen=True)
class Data:
    """Batches of keyword arguments, and what goes with them.

    Attributes:
        batches: of examples along dimension 0.
        loss: of an output and its batch; None where only activations are to be had.
        notes: what a report should say about them.
        source: the file that they were read from and its column; None if they come from no file.
    """

    batches: list[dict[str, Tensor]]
    loss: Loss | None
    notes: tuple[str, ...] = ()
    source: str | None = None


def mean_loss(model: nn.Module, data: Data) -> float:
    """Mean loss over the examples, without gradients."""
    assert data.loss is not None
    total, examples = 0.0, 0
    with torch.no_grad():
        for batch in data.batches:
            n = next(iter(batch.values())).shape[0]
            # Labels would only make the model compute a loss of its own.
            output = model(**{k: v for k, v in batch.items() if k != "labels"})
            total += float(data.loss(output, batch)) * n
            examples += n
    return total / examples


def example_input(model: nn.Module) -> dict[str, Tensor] | None:
    """A plausible input to time a forward pass on; None if the model does not say what it takes."""
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and getattr(config, "vocab_size", None):
        length = min(128, getattr(config, "max_position_embeddings", 128) or 128)
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids}
        return inputs | {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else inputs
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        parameter = next(model.parameters())
        return {
            "pixel_values": torch.zeros(
                1, getattr(config, "num_channels", 3), height, width, dtype=parameter.dtype
            )
        }
    return None


def of_tokens(ids: Tensor) -> dict[str, Tensor]:
    """Token ids [examples, length], all of which count, as the arguments of a model."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stacked(batches: list[dict[str, Tensor]], most: int = 4) -> list[dict[str, Tensor]]:
    """Neighbours of equal length joined into batches of up to `most`."""
    out: list[dict[str, Tensor]] = []
    for batch in batches:
        last = out[-1] if out else None
        if (
            last is not None
            and last["input_ids"].shape[1] == batch["input_ids"].shape[1]
            and len(last["input_ids"]) < most
        ):
            out[-1] = {k: torch.cat([last[k], batch[k]]) for k in batch}
        else:
            out.append(batch)
    return out


def masked(batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Hide tokens as in masked language modelling; the same ones every time."""
    if tokenizer.mask_token_id is None:
        raise SecateurError("The tokenizer has no mask token, which a masked language model needs.")
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(0)
    hide = torch.rand(ids.shape, generator=generator) < _MASKED_SHARE
    hide[:, ids.shape[1] // 2] = True  # every example has a loss
    return batch | {
        "input_ids": ids.masked_fill(hide, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hide, IGNORED),
    }


def next_token(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every token but the first, which nothing precedes."""
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def labelled(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the labels, where there are any."""
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten(), ignore_index=IGNORED)
