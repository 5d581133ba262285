"""Calls whose size arguments must follow the tensor, as edits of source."""

from __future__ import annotations

from collections.abc import Iterable

from secateur.callsites import CallSite, Edit, locate
from secateur.core.errors import SurgeryError
from secateur.graph.plan import Repair


def edits_of(repairs: Iterable[Repair]) -> list[Edit]:
    """One edit for each size argument; `SurgeryError` where the call cannot be found in its source."""
    edits: dict[Edit, None] = {}
    for repair in repairs:
        assert repair.place.code is not None
        site = locate(repair.place.code, repair.place.instruction)
        if not isinstance(site, CallSite):
            raise SurgeryError(f"{repair.call} at {repair.place} holds a size that changes, and {site}.")
        for argument, dimension in repair.arguments:
            edits[site.edit(argument, dimension)] = None
    return list(edits)
