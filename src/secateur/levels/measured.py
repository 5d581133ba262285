"""An allocation that was measured: the sparsity of each layer, and how it was found; as a file, JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.allocation import Layer, rounded
from secateur.core.errors import ArtifactError, BudgetError, SelectionError
from secateur.core.files import write_text
from secateur.core.topk import count

_FORMAT = 1


@dataclass(frozen=True)
class Tried:
    """One allocation on the way.

    Attributes:
        what: "uniform", "by error" or "generation 3".
        distance: of the model's outputs from the dense ones, on the data that decides.
        held_out: the same on batches that play no part in anything; None if there are none.
    """

    what: str
    distance: float
    held_out: float | None


@dataclass(frozen=True, repr=False)
class Measured:
    """The sparsity of each layer, as `by_error` or `by_search` found it; an allocation.

    Call it as any other, `prune_(..., allocation=measured)`; with the layers and the total that it was made
    for, or without a total. A pattern with other units gets the same sparsities, rounded to the total.

    Attributes:
        how: "by_error" or "by_search".
        sparsity: the total.
        shares: sparsity of each layer by name.
        history: what was tried; the shares are those of the entry with the least distance, or of the last
            for `by_error`.
        settings: of the measurement, as text.
    """

    how: str
    sparsity: float
    shares: Mapping[str, float] = field(hash=False)
    history: tuple[Tried, ...] = field(default=(), hash=False)
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        # Short, for reports, and different for different shares: a run is resumed if its settings read alike.
        shares = json.dumps(dict(self.shares), sort_keys=True).encode()
        return f"Measured({self.how}, {self.sparsity:g}, {hashlib.sha256(shares).hexdigest()[:8]})"

    def __call__(self, layers: Sequence[Layer], sparsity: float | None) -> dict[str, float]:
        """Sparsity of each layer.

        Raises:
            SelectionError: other layers than it was measured for.
            BudgetError: another total.
        """
        names = [layer.name for layer in layers]
        if other := set(names) ^ set(self.shares):
            new = sorted(other & set(names))
            said = f"{new[0]} was not measured" if new else f"{min(other)} was measured but is not selected"
            raise SelectionError(f"{self}: {said}. Pass the same where= to both, and the same model.")
        if sparsity is not None and abs(sparsity - self.sparsity) > 1e-9:
            raise BudgetError(f"{self} is for a sparsity of {self.sparsity:g}, not of {sparsity:g}.")
        total = count(self.sparsity, sum(layer.units for layer in layers))
        return rounded(layers, [self.shares[layer.name] * layer.units for layer in layers], total)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all."""
        write_text(path, json.dumps({"format": _FORMAT, **to_data(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measured:
        """Read what `save` wrote.

        Raises `ArtifactError` for anything else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as an allocation: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is not an allocation that Measured.save wrote, of format {_FORMAT}.")
        try:
            shares = {str(name): float(share) for name, share in data["shares"].items()}
            settings = {str(k): str(v) for k, v in data["settings"].items()}
            history = history_of(data["history"])
            found = cls(str(data["how"]), float(data["sparsity"]), shares, history, settings)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ArtifactError(f"{path} is damaged: measure again.") from None
        if not all(0 <= s <= 1 for s in (found.sparsity, *found.shares.values())):
            raise ArtifactError(f"{path} holds sparsities outside [0, 1].")
        return found


def to_data(measured: Measured) -> dict[str, object]:
    """What a file holds."""
    return {
        "how": measured.how,
        "sparsity": measured.sparsity,
        "shares": dict(measured.shares),
        "history": [[one.what, one.distance, one.held_out] for one in measured.history],
        "settings": dict(measured.settings),
    }


def history_of(data: object) -> tuple[Tried, ...]:
    """What was tried, from a file; `TypeError` or `ValueError` for anything else."""
    if not isinstance(data, list):
        raise TypeError("not a list")
    return tuple(Tried(str(w), float(d), None if h is None else float(h)) for w, d, h in data)
