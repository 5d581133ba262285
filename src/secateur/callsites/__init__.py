"""Repairs of single arguments in somebody's `view`, `reshape` and attention calls, in the running process."""

from secateur.callsites.locate import locate
from secateur.callsites.patch import Applied, apply_edits, in_force
from secateur.callsites.sites import ATTENTION, CallSite, Edit, Reason
from secateur.callsites.sources import CallSiteError

__all__ = [
    "ATTENTION",
    "Applied",
    "CallSite",
    "CallSiteError",
    "Edit",
    "Reason",
    "apply_edits",
    "in_force",
    "locate",
]
