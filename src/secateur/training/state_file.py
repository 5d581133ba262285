"""The state of a method in one safetensors file, for frameworks that keep checkpoints in folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.errors import ArtifactError
from secateur.core.files import replacing

FORMAT = "secateur-training-1"


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what a method's `state_dict` gave, atomically: texts, and tensors by name in groups."""
    tensors: dict[str, Tensor] = {}
    texts = {"format": FORMAT}
    for key, value in state.items():
        if isinstance(value, str):
            texts[key] = value
        else:
            tensors.update({f"{key}/{name}": t.detach().cpu().contiguous() for name, t in value.items()})
    with replacing(path) as temporary:
        save_file(tensors, temporary, texts)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote; `ArtifactError` if the file is missing, damaged or something else."""
    if not Path(path).is_file():
        raise ArtifactError(f"There is no state of a pruning method at {path}.")
    state: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as f:
            texts = dict(f.metadata() or {})
            for full in f.keys():  # noqa: SIM118, not a mapping
                key, _, name = full.partition("/")
                state.setdefault(key, {})[name] = f.get_tensor(full)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} is not a safetensors file, or a damaged one: {error}.") from None
    if texts.pop("format", None) != FORMAT:
        raise ArtifactError(f"{path} is not the state of a pruning method ({FORMAT}).")
    return state | texts
