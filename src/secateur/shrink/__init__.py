"""Structured pruning to a budget: trace, score, choose, repair, cut, prove."""

from secateur.shrink.entry import DEFAULT_KINDS, shrink_
from secateur.shrink.select import select_groups
from secateur.shrink.steps import Repair

__all__ = ["DEFAULT_KINDS", "Repair", "select_groups", "shrink_"]
