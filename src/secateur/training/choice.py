"""Masks by score, as a method of training asks for them again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.allocation import Allocation
from secateur.collect import Collected, Loss, collect
from secateur.core.names import Target, Where
from secateur.criteria import Criterion
from secateur.patterns import Pattern, Unstructured
from secateur.prune import check_targets, choose_masks, refuse_class


class Choice:
    """A criterion, pattern and allocation on the layers of one model, with the data that they need."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        criterion: Criterion,
        pattern: Pattern | None,
        allocation: Allocation,
        batches: Iterable[Any] | None,
        loss: Loss | None,
    ) -> None:
        refuse_class(criterion)
        refuse_class(pattern)
        self.model, self.targets, self.criterion, self.allocation = model, targets, criterion, allocation
        self.pattern = pattern or Unstructured()
        self._batches = list(batches) if isinstance(batches, Iterator) else batches  # read every time
        self._loss = loss
        check_targets(targets, self.pattern)

    def __call__(
        self, sparsity: float | None, pattern: Pattern | None = None
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Masks in the shapes of the parameters, and notes; weights that are zero already go first."""

        def measured() -> Collected:
            return collect(self.model, self.criterion.needs, self._batches, self._loss, self.targets)

        keep, _, notes = choose_masks(
            self.targets, self.criterion, pattern or self.pattern, self.allocation, measured, sparsity
        )
        return {t.name: t.layout.restore(keep[t.name], t.weight.shape) for t in self.targets}, notes

    def settings(self, where: Where | None) -> dict[str, str]:
        """What it was made with, for a report."""
        return {
            "criterion": repr(self.criterion),
            "pattern": repr(self.pattern),
            "allocation": getattr(self.allocation, "__name__", repr(self.allocation)),
            "where": repr(where or Where()),
        }
