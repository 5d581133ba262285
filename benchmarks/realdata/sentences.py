"""MiniLM sentence embeddings with the STS benchmark and Banking77."""

import csv
import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from .evaluate import evaluating
from .root import count, data_root, evenly, tokenizer

FOLDER = "minilm_l6"
PAD = 0  # [PAD] of MiniLM's vocabulary; it occurs in no sentence, so the attention mask is `ids != PAD`
MAX_TOKENS = 128
MAX_SCORE = 5.0

StsSplit = Literal["train", "dev", "test"]


def minilm() -> Any:
    """all-MiniLM-L6-v2 (Hugging Face `BertModel`, 6 layers, hidden 384, 22.6 M parameters) in float32.

    Its pooler is taken out: sentence embeddings never read it, so no criterion could judge its weights.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(data_root() / FOLDER, dtype=torch.float32)
    model.pooler = None
    return model.eval()


class StsModel(nn.Module):
    """Similarity of two sentences: token ids [B, 2, L] (padded with 0) -> cosine similarity [B].

    A thin view of an encoder whose parameters are its only parameters: pruning it prunes the encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids_B2L: Tensor) -> Tensor:
        batch, _, length = ids_B2L.shape
        e_B2D = _embed(self.encoder, ids_B2L.reshape(2 * batch, length)).view(batch, 2, -1)
        return (e_B2D[:, 0] * e_B2D[:, 1]).sum(-1)


def sts_loss(cosine_B: Tensor, score_B: Tensor) -> Tensor:
    """Mean squared difference of cosine and score / 5 (regression objective of Reimers & Gurevych 2019)."""
    return F.mse_loss(cosine_B, score_B / MAX_SCORE)


def sts_inputs(pairs: list[tuple[str, str]]) -> Tensor:
    """Token ids [B, 2, L] of pairs of sentences, padded with 0 to the longest of them."""
    rows = _token_ids([sentence for pair in pairs for sentence in pair])
    return _pad(rows).view(len(pairs), 2, -1)


def stsb(split: StsSplit, n: int | None = None) -> tuple[list[tuple[str, str]], Tensor]:
    """Pairs of the STS benchmark (train 2,999, dev 1,000, test 879) and their scores [n] in 0..5.

    The files are ordered by source; n pairs are spread evenly over the file.

    Raises:
        ValueError: unknown split, or n larger than the split.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"The split must be 'train', 'dev' or 'test', but it is {split!r}.")
    rows = _table(data_root() / "stsb" / f"{split}.tsv")
    rows = [rows[i] for i in evenly(n, len(rows), f"STS-b {split}")]
    scores = torch.tensor([float(row["score"]) for row in rows])
    return [(row["sentence1"], row["sentence2"]) for row in rows], scores


def encode(model: nn.Module, sentences: list[str], batch: int = 64) -> Tensor:
    """Normalised sentence embeddings [N, D] by a MiniLM encoder or an `StsModel`.

    Each distinct sentence is computed once, in batches of like length.
    """
    encoder = model.encoder if isinstance(model, StsModel) else model
    distinct = list(dict.fromkeys(sentences))
    rows = _token_ids(distinct)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with evaluating(encoder):
        pieces = (order[i : i + batch] for i in range(0, len(order), batch))
        embedded = torch.cat([_embed(encoder, _pad([rows[i] for i in piece])) for piece in pieces])
    place = {distinct[i]: row for row, i in enumerate(order)}
    return embedded[[place[sentence] for sentence in sentences]]


def sts_spearman(model: nn.Module, split: StsSplit = "test", limit: int | None = None) -> float:
    """Spearman correlation (average ranks for ties) of cosine and score; dense 0.8099 on test, 0.8634 on dev.

    `limit` takes that many pairs, spread evenly over the split.

    Raises:
        ValueError: the correlation is undefined, because all similarities or scores are equal or not numbers.
    """
    pairs, scores = stsb(split, limit)
    embedded = encode(model, [first for first, _ in pairs] + [second for _, second in pairs])
    first, second = embedded.chunk(2)
    cosine = (first * second).sum(-1)
    for what, values in (("similarities", cosine), ("scores", scores)):
        if not values.max() > values.min():
            raise ValueError(
                f"Spearman on STS-b {split} is undefined: all {len(values)} {what} are equal or not numbers."
            )
    return float(spearmanr(cosine, scores).statistic)


def banking77(split: Literal["train", "test"], n: int | None = None) -> tuple[list[str], Tensor]:
    """The first n questions of Banking77 (train 10,003, test 3,080) and their intents [n], 0..76.

    The classes are dealt out in turn: every multiple of 77 gives a class-balanced subset of the test set.

    Raises:
        ValueError: unknown split, or n larger than the split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The split must be 'train' or 'test', but it is {split!r}.")
    classes = json.loads((data_root() / "banking77" / "labels.json").read_text(encoding="utf-8"))
    with (data_root() / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], classes.index(row["category"])) for row in csv.DictReader(file)]
    seen: dict[int, int] = defaultdict(int)
    dealt = []
    for text, label in rows:
        dealt.append((seen[label], label, text))
        seen[label] += 1
    dealt = sorted(dealt)[: count(n, len(rows), f"Banking77 {split}")]
    return [text for _, _, text in dealt], torch.tensor([label for _, label, _ in dealt])


def banking77_head() -> nn.Linear:
    """The linear layer from MiniLM's normalised embedding [B, 384] to the 77 intents [B, 77]."""
    weights = load_file(data_root() / FOLDER / "banking77_head.safetensors")
    head = nn.Linear(384, 77)
    head.load_state_dict(weights)
    return head.eval()


def banking77_accuracy(model: nn.Module, limit: int | None = None) -> float:
    """The fraction of test questions whose intent the head reads from the embedding; dense 0.9188 on all."""
    texts, labels = banking77("test", limit)
    with torch.no_grad():
        logits = banking77_head()(encode(model, texts))
    return float((logits.argmax(1) == labels).float().mean())


def _embed(encoder: nn.Module, ids_BL: Tensor) -> Tensor:
    """Mean of the last hidden state over the real tokens, then L2-normalised: [B, L] -> [B, D]."""
    mask_BL = ids_BL != PAD
    hidden_BLD = encoder(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
    total_BD = (hidden_BLD * mask_BL[..., None]).sum(1)
    return F.normalize(total_BD / mask_BL.sum(1, keepdim=True), dim=-1)


def sentence_ids(sentence: str) -> Tensor:
    """Token ids [L] of one sentence, not padded."""
    return torch.tensor(_token_ids([sentence])[0])


def _token_ids(sentences: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(FOLDER)(sentences, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids


def _pad(rows: list[list[int]]) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)


@cache
def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
