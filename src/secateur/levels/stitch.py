"""A model whose layers stand at levels of a database, for a while."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor, nn

from secateur.core.modes import drop_caches
from secateur.levels.database import Database


class Stitched:
    """While this holds, `set` puts layers to levels; afterwards the model has its own weights again.

    Only layers whose level changes are touched, and the dense weights stay where they are: parameters point
    to other tensors meanwhile.
    """

    def __init__(self, model: nn.Module, database: Database) -> None:
        self._model, self._database = model, database
        self._dense: list[Tensor] = []
        self._levels: list[int | None] = []

    def __enter__(self) -> Stitched:
        self._dense = [t.weight.data for t in self._database.targets]
        self._levels = [None] * len(self._dense)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set([None] * len(self._dense))

    def set(self, levels: Sequence[int | None]) -> None:
        """Put every layer to its level, None for the dense one."""
        changed = False
        for i, level in enumerate(levels):
            if level == self._levels[i]:
                continue
            weight = self._dense[i]
            if level is not None:
                weight = self._database.weight(i, level).to(weight.device)
            self._database.targets[i].weight.data = weight
            self._levels[i], changed = level, True
        if changed:
            drop_caches(self._model)
