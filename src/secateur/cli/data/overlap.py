"""Whether a model is tested on what it was calibrated with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from secateur.cli.data.batches import IGNORED, Data


def overlap_note(calibration: Data | None, held_out: Data | None) -> str | None:
    """A sentence for the report if test data is also calibration data; None if none of it is.

    Windows are compared token for token. Windows of one file that begin elsewhere are told by the file.
    """
    if calibration is None or held_out is None:
        return None
    seen = set(_windows(calibration))
    tested = list(_windows(held_out))
    if shared := sum(window in seen for window in tested):
        return (
            f"{shared} of the {len(tested)} examples that the loss was measured on are among those for "
            "calibration: it says little about other text."
        )
    if held_out.source is not None and held_out.source == calibration.source:
        return (
            f"The loss was measured on the file of the calibration, {held_out.source}: its examples may "
            "overlap with those for calibration."
        )
    return None


def _windows(data: Data) -> Iterator[tuple[int, ...]]:
    for batch in data.batches:
        ids = batch.get("input_ids")
        if ids is not None and ids.dim() == 2 and not ids.is_floating_point():
            yield from map(tuple, _unmasked(ids, batch.get("labels")).tolist())


def _unmasked(ids: Tensor, labels: Tensor | None) -> Tensor:
    """What was hidden for a masked language model depends on the place in the batch."""
    if labels is None or labels.shape != ids.shape:
        return ids
    return ids.where(labels == IGNORED, labels)
