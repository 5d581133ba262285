"""MiniLM on the STS benchmark and on Banking77: data, metrics and the recipe of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import realdata
from benchmarks.realdata.sentences import _embed, _pad, _token_ids

from .task import Batch, Split, Target, Task

RATE, EPOCHS, BATCH = 3e-5, 1, 32
FOLD = 10  # of Banking77, every tenth training question is for validation
VALID = 500  # pairs of the STS development set by which variants are compared
CALIBRATION = 512

TARGETS = (
    Target("heads", 0.2, "20 % of all heads"),
    Target("heads", 0.4, "40 % of all heads"),
    Target("ffn", 0.5, "50 % of the FFN neurons"),
)


class IntentModel(nn.Module):
    """Intent of a question: token ids [B, L] (padded with 0) -> logits [B, 77]."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, ids_BL: Tensor) -> Tensor:
        logits: Tensor = self.head(_embed(self.encoder, ids_BL))
        return logits


def _example() -> Tensor:
    """One sentence of 32 tokens, as the encoders of both tasks see it."""
    return torch.full((1, 32), 1000)


def _questions(split: Split | Literal["train"]) -> tuple[list[str], Tensor]:
    if split == "test":
        return realdata.banking77("test")
    texts, labels = realdata.banking77("train")
    rows = [i for i in range(len(texts)) if (i % FOLD == 0) == (split == "valid")]
    return [texts[i] for i in rows], labels[rows]


def _intent_batches(texts: list[str], labels: Tensor) -> list[Batch]:
    """Batches of like length, so that little is padding."""
    ids = _token_ids(texts)
    pieces = torch.split(torch.tensor([len(row) for row in ids]).argsort(stable=True), BATCH)
    return [(_pad([ids[i] for i in piece.tolist()]), labels[piece]) for piece in pieces]


def _intent_calibration(seed: int) -> list[Batch]:
    texts, labels = _questions("train")
    part = slice(CALIBRATION * seed, CALIBRATION * (seed + 1))
    return _intent_batches(texts[part], labels[part])


def _intent_accuracy(model: nn.Module, split: Split) -> float:
    texts, labels = _questions(split)
    with realdata.evaluating(model):
        right = sum(int((model(ids).argmax(1) == y).sum()) for ids, y in _intent_batches(texts, labels))
    return right / len(labels)


def _spearman(model: nn.Module, split: Split) -> float:
    return realdata.sts_spearman(model, "dev", VALID) if split == "valid" else realdata.sts_spearman(model)


def _sts_calibration(seed: int) -> list[Batch]:
    return realdata.calibration("stsb", CALIBRATION * (seed + 1), BATCH)[seed :: seed + 1]


def _tune(
    batches: Callable[[], list[Batch]], loss: Callable[..., Tensor]
) -> Callable[[nn.Module, int | None, int], None]:
    def tune_(model: nn.Module, steps: int | None, seed: int) -> None:
        """AdamW, one epoch of batches of 32, rate falling linearly from 3e-5, no dropout."""
        data = batches()
        draw = torch.Generator().manual_seed(seed)
        total = EPOCHS * len(data) if steps is None else steps
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
        model.eval()
        for step, i in enumerate(torch.randperm(len(data), generator=draw)[:total].tolist()):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / total)
            inputs, target = data[i]
            optimizer.zero_grad()
            loss(model(inputs), target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return tune_


STS = Task(
    "minilm-sts",
    "MiniLM-L6, STS-b: Spearman correlation on the 879 test pairs",
    TARGETS,
    lambda: realdata.StsModel(realdata.minilm()),
    lambda: _example()[:, None].expand(1, 2, -1),
    _sts_calibration,
    realdata.sts_loss,
    _spearman,
    tune=_tune(lambda: realdata.calibration("stsb", 2999, BATCH), realdata.sts_loss),
    probe=20,
    tuned=("ffn",),
)

BANKING = Task(
    "minilm-banking",
    "MiniLM-L6, Banking77: accuracy on the 3,080 test questions",
    TARGETS,
    lambda: IntentModel(realdata.minilm(), realdata.banking77_head()),
    _example,
    _intent_calibration,
    F.cross_entropy,
    _intent_accuracy,
    tune=_tune(lambda: _intent_batches(*_questions("train")), F.cross_entropy),
    probe=20,
    tuned=("ffn",),
)
