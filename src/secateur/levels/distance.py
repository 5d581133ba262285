"""How far a model's outputs are from those of the dense one, on given batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.collect.batches import Batch
from secateur.core.errors import NonFiniteError, StatsError


class Distance:
    r"""$\mathrm{KL}(p_\mathrm{dense} \,\|\, p)$ of logits, the mean over tokens, in nats.

    For a model that returns no `logits`, the squared difference of the outputs over the power of the dense
    ones. Tokens that an `attention_mask` hides do not count.

    Memory: the dense outputs on all batches, in their own type.
    """

    def __init__(self, model: nn.Module, data: Sequence[Batch]) -> None:
        self._model, self._data = model, data
        self._dense: list[Tensor] = []
        self.is_kl = True
        for i in range(len(data)):
            output, self.is_kl = self._output(i)
            if not bool(torch.isfinite(output).all()):
                raise NonFiniteError(f"The model's outputs on batch {i} are not finite.")
            self._dense.append(output)

    def __len__(self) -> int:
        return len(self._data)

    def __call__(self, batches: Iterable[int]) -> float:
        """Of the model as it is now; infinite if its outputs are not finite."""
        far, size = 0.0, 0.0
        for i in batches:
            one, weight = self._of(i)
            far, size = far + one, size + weight
        return far / size if size and math.isfinite(far) else math.inf

    def _output(self, i: int) -> tuple[Tensor, bool]:
        torch.manual_seed(i)  # models that draw in their forward pass draw the same every time
        output = self._data[i].forward(self._model)
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits, True
        return _floating(output), False

    def _of(self, i: int) -> tuple[float, float]:
        """The sum of the distances of all tokens, and their number; or of squares, and the power."""
        dense, now = self._dense[i].float(), self._output(i)[0].float()
        if not self.is_kl:
            return float((now - dense).square().sum(dtype=torch.float64)), float(
                dense.double().square().sum()
            )
        p, q = F.log_softmax(dense, dim=-1), F.log_softmax(now, dim=-1)
        kl = (p.exp() * (p - q)).sum(dim=-1)
        mask = self._data[i].kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == kl.shape:
            kl = kl[mask.bool()]
        return float(kl.sum(dtype=torch.float64)), float(kl.numel())


def _floating(output: Any) -> Tensor:
    found = (x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
    output = next(found, None)
    if output is None:
        raise StatsError(
            "The model returns no tensor of numbers, so it cannot be compared with the dense one."
        )
    return output
