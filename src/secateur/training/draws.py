"""Random draws that depend on nothing but a seed, a name and a step."""

from __future__ import annotations

import hashlib

import torch


def generator_at(seed: int, name: str, step: int) -> torch.Generator:
    """The same draws for a layer at a step on every rank, and after every resumption."""
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
