"""A data file as batches for a Hugging Face model, with the loss of its task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import SecateurError
from secateur.core.modes import evaluation

_MASKED_SHARE = 0.15  # of the tokens, as BERT was trained
_IGNORED = -100  # label of positions that do not count


@dataclass(frozen=True)
class Data:
    """Batches of keyword arguments, and the loss that goes with them (None: activations only)."""

    batches: list[dict[str, Tensor]]
    loss: Loss | None


def read_data(file: Path, folder: Path, model: nn.Module, task: str, samples: int, length: int) -> Data:
    """Read `file` for `model`, whose tokenizer lies in `folder`.

    `.txt`: one text, cut into windows; `.json`: a list of texts; `.jsonl`: objects with "text" and, for
    classification, "label"; `.safetensors`: the model's keyword arguments, tensors with examples along
    dimension 0.
    """
    if not file.is_file():
        raise SecateurError(f"There is no data file {file}.")
    if samples < 1 or length < 2:
        raise SecateurError(f"--samples is at least 1 and --length at least 2; got {samples} and {length}.")
    if file.suffix == ".safetensors":
        return _from_tensors(file, samples, model)
    texts, labels = _texts(file)
    tokenizer = _tokenizer(folder)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or length
    length = min(length, limit)
    if labels is not None and task == "text-classification":
        return _classification(tokenizer, texts, labels, samples, length)
    if len(texts) == 1:
        ids = tokenizer(texts[0], verbose=False)["input_ids"]
        rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:samples] or [ids]
    else:
        rows = [tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts]
        rows = [r for r in rows if len(r) > 1][:samples]
    if not rows or len(rows[0]) < 2:
        raise SecateurError(f"{file} holds no text of at least two tokens.")
    # One example a batch where lengths differ: padding would count as data.
    batches = [
        {"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r), dtype=torch.long)}
        for r in rows
    ]
    if task == "text-generation":
        return Data(_stacked(batches), _next_token)
    if task == "fill-mask":
        return Data([_masked(b, tokenizer) for b in _stacked(batches)], _labelled)
    return Data(_stacked(batches), None)


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


def _from_tensors(file: Path, samples: int, model: nn.Module) -> Data:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise SecateurError(f"{file} is not a readable safetensors file: {error}.") from None
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise SecateurError(
            f"The tensors of {file} must share their first dimension, the examples; got {sorted(sizes)}."
        )
    n = min(samples, sizes.pop())
    batches = [{k: t[i : i + 8] for k, t in tensors.items()} for i in range(0, n, 8)]
    _try(file, model, {k: t[:1] for k, t in tensors.items()})
    return Data(batches, _labelled if "labels" in tensors else None)


def _try(file: Path, model: nn.Module, first: dict[str, Tensor]) -> None:
    """Run the model on one example, so that what it cannot take is said before anything is changed."""
    taken = [
        p.name for p in signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if taken and (odd := [name for name in first if name not in taken]):
        raise SecateurError(
            f"The model does not take the tensors {', '.join(odd)} of {file}: it takes {', '.join(taken)}."
        )
    ids = first.get("input_ids")
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if ids is not None and not ids.is_floating_point() and isinstance(table, nn.Embedding):
        largest = int(ids.max())
        if largest >= table.num_embeddings:
            raise SecateurError(
                f"{file} has the token {largest}, but the model knows {table.num_embeddings}."
            )
    try:
        with evaluation(model), torch.no_grad():
            model(**first)
    except Exception as error:  # a forward pass can fail in as many ways as there are models
        what = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise SecateurError(
            f"The tensors of {file} must be the arguments of the model, by name; it fails with: {what[0]}"
        ) from None


def _texts(file: Path) -> tuple[list[str], list[int] | None]:
    try:
        raw = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            rows = json.loads(raw)
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
        else:
            rows = [raw]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SecateurError(f"{file} cannot be read as {file.suffix or 'text'}: {error}.") from None
    if not isinstance(rows, list) or not rows:
        raise SecateurError(f"{file} must hold a list of texts.")
    texts = [r.get("text") if isinstance(r, dict) else r for r in rows]
    good = [t for t in texts if isinstance(t, str) and t.strip()]
    if len(good) < len(texts):
        raise SecateurError(f"{file} must hold texts that are not empty, or objects with a 'text'.")
    labels = [r["label"] for r in rows if isinstance(r, dict) and isinstance(r.get("label"), int)]
    return good, labels if len(labels) == len(rows) else None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SecateurError(
            f"{folder} holds no tokenizer that can be read ({str(error).splitlines()[0]})."
        ) from None


def _classification(tokenizer: Any, texts: list[str], labels: list[int], samples: int, length: int) -> Data:
    batches = []
    for text, label in list(zip(texts, labels, strict=True))[:samples]:
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        batches.append({**ids, "labels": torch.tensor([label])})
    return Data(batches, _labelled)


def _stacked(batches: list[dict[str, Tensor]], most: int = 4) -> list[dict[str, Tensor]]:
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


def _masked(batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
    """Hide tokens as in masked language modelling; the same ones every time."""
    if tokenizer.mask_token_id is None:
        raise SecateurError("The tokenizer has no mask token, which a masked language model needs.")
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(0)
    hide = torch.rand(ids.shape, generator=generator) < _MASKED_SHARE
    hide[:, ids.shape[1] // 2] = True  # every example has a loss
    return batch | {
        "input_ids": ids.masked_fill(hide, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hide, _IGNORED),
    }


def _next_token(output: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def _labelled(output: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten(), ignore_index=_IGNORED)
