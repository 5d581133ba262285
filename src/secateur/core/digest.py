"""Digests of tensors: what was computed from other weights must not be taken for the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> bytes:
    """The entries of a tensor, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def take(found: Any, tensor: Tensor) -> None:
    """Feed a hash of `hashlib` with the shape, type and entries of a tensor."""
    found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    found.update(bytes_of(tensor))


def take_state(found: Any, state: Mapping[str, Any]) -> None:
    """Feed a hash with the tensors of a `state_dict`, and their names."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            found.update(name.encode())
            take(found, tensor)


def state_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors of a `state_dict`."""
    found = hashlib.sha256()
    take_state(found, state)
    return found.hexdigest()
