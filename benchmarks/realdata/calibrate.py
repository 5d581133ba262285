"""Calibration batches, from training data only."""

from typing import Literal

import torch
from torch import Tensor

from .language import CONTEXT, FIRST_TEST_STORY, cut, stories, wikitext2_windows
from .root import count, tokenizer
from .sentences import PAD, sts_inputs, stsb
from .vision import cifar10, fashion_mnist

Batch = tuple[Tensor, Tensor]


def calibration(
    name: Literal["cifar10", "fashion_mnist", "stsb", "stories", "wikitext2"], n: int, batch: int
) -> list[Batch]:
    """n examples for calibration as batches (inputs, target), never from a test set.

    An example is an image, a pair of sentences (sorted by length, each batch padded to its own longest), or
    a window of 512 tokens that is its own target (stories 0-599 for `stories260k`, the validation text of
    WikiText-2 for `smollm2`).

    Raises:
        ValueError: unknown name, or n larger than the data set.
    """
    match name:
        case "cifar10":
            return _split(cifar10("train", n), batch)
        case "fashion_mnist":
            return _split(fashion_mnist("train", n), batch)
        case "stsb":
            return _sts(n, batch)
        case "stories":
            rows = tokenizer("stories260k")(stories(0, FIRST_TEST_STORY), verbose=False)["input_ids"]
            ids_WT = cut([token for row in rows for token in row], CONTEXT)
            return _windows(ids_WT, n, batch, "TinyStories 0-599")
        case "wikitext2":
            return _windows(wikitext2_windows("valid", CONTEXT), n, batch, "WikiText-2 valid")
    raise ValueError(
        f"No calibration data named {name!r}: choose cifar10, fashion_mnist, stsb, stories or wikitext2."
    )


def _split(data: Batch, batch: int) -> list[Batch]:
    return list(zip(torch.split(data[0], batch), torch.split(data[1], batch), strict=True))


def _sts(n: int, batch: int) -> list[Batch]:
    pairs, scores = stsb("train", n)
    # Padding is traffic too: batches of like length keep its share of the statistics small.
    lengths_N = (sts_inputs(pairs) != PAD).sum(-1).amax(-1)
    pieces = torch.split(lengths_N.argsort(stable=True), batch)
    return [(sts_inputs([pairs[i] for i in piece.tolist()]), scores[piece]) for piece in pieces]


def _windows(ids_WT: Tensor, n: int, batch: int, what: str) -> list[Batch]:
    ids_NT = ids_WT[: count(n, len(ids_WT), what)]
    return _split((ids_NT, ids_NT), batch)
