"""SmolLM2-135M on WikiText-2: perplexity."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import realdata

from .task import Batch, Split, Target, Task

WINDOWS = {"valid": 2, "test": 6}  # validation: 512 tokens each; test: the protocol of the data, 1024
CALIBRATION = 8  # windows of 512 tokens
PREFILL = 256  # tokens of the pass that is timed
COUNTED = 64  # tokens of the pass whose MACs are counted


def _calibration(seed: int) -> list[Batch]:
    """Windows of WikiText-2's validation text, those that compare variants left out."""
    n = WINDOWS["valid"] + CALIBRATION * (seed + 1)
    return realdata.calibration("wikitext2", n, 1)[-CALIBRATION:]


def _perplexity(model: nn.Module, split: Split) -> float:
    if split == "test":
        return realdata.wikitext2_perplexity(model, WINDOWS["test"])
    with realdata.evaluating(model):
        windows = realdata.calibration("wikitext2", WINDOWS["valid"], 1)
        losses = [realdata.next_token_loss(model(ids), ids) for ids, _ in windows]
    return float(torch.stack(losses).mean().exp())


SMOLLM2 = Task(
    "smollm2",
    "SmolLM2-135M, WikiText-2: perplexity on the first 6 windows of 1,024 tokens of the test text",
    (
        Target("width", 0.1, "10 % of the blocks' width"),
        Target("width", 0.2, "20 % of the blocks' width"),
        Target("layers", 0.1, "10 % of the layers"),
        Target("layers", 0.2, "20 % of the layers"),
    ),
    realdata.smollm2,
    lambda: {"input_ids": torch.full((1, COUNTED), 1000), "use_cache": False},
    _calibration,
    realdata.next_token_loss,
    _perplexity,
    higher=False,
    share=1 - 576 * 49_152 / 136.7e6,  # of the MACs of a token; the output head is no block
)
