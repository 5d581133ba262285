"""Norms of the inputs of all layers of the dense model, in one walk over its blocks: what rankings need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.core.errors import StatsError
from secateur.progress import track
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.measure import Rows, Tokens
from secateur.reconstruct.order import listening, measuring
from secateur.stream import ranks
from secateur.stream.walk import Walk, Weights


def input_norms(walk: Walk, weights: Weights, consumers: Sequence[Consumer]) -> dict[str, Tensor]:
    """Root mean square of every input feature of every layer, `[inputs]`; the walk ends behind all blocks."""
    sums: dict[str, Tensor] = {c.name: torch.zeros(c.inputs, dtype=torch.float64) for c in consumers}
    counts = dict.fromkeys(sums, 0)
    rows = Rows(Tokens())

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        for (part,) in rows.blocks(module, x):
            sums[consumer.name] += part.float().square().sum(0).double().cpu()
            counts[consumer.name] += len(part)

    for n, block in enumerate(track(walk.chain.blocks, "measuring norms")):
        mine = [c for c in consumers if walk.chain.begin(c) == n]
        with weights.resident(block), measuring(walk.model), listening(walk.model, mine, hear):
            walk.advance(n + 1)
    for name, total in sums.items():
        ranks.add_(total)
        counts[name] = ranks.total(counts[name])
        if not counts[name]:
            raise StatsError(f"No batch reaches {name}, so its weights cannot be ranked by their inputs.")
    return {name: (total / counts[name]).sqrt().float() for name, total in sums.items()}
