"""Cutting a model: what to keep as data, previewed, applied wholly or not at all, undone, replayed."""

from secateur.surgery.apply import Applied, carry_out
from secateur.surgery.cuts import Attribute, CutAxis, Cuts
from secateur.surgery.surgery import Plan, Surgery, as_data, read_cuts, replay_, save_cuts

__all__ = [
    "Applied",
    "Attribute",
    "CutAxis",
    "Cuts",
    "Plan",
    "Surgery",
    "as_data",
    "carry_out",
    "read_cuts",
    "replay_",
    "save_cuts",
]
