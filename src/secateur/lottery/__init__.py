"""Winning tickets: iterative pruning with rewinding, controls, connectivity, and a store of all trainings."""

from secateur.lottery.branches import (
    AtInit,
    Branch,
    OneShot,
    RandomTicket,
    Reinitialised,
    Shuffled,
    Smaller,
    Ticket,
    Transfer,
    Twin,
)
from secateur.lottery.experiment import Lottery
from secateur.lottery.fit import Fit, Milestones, milestones
from secateur.lottery.rewind import Rewind, fine_tune, rewind_rate, rewind_to
from secateur.lottery.store import Finished, Store
from secateur.lottery.trial import Trial

__all__ = [
    "AtInit",
    "Branch",
    "Finished",
    "Fit",
    "Lottery",
    "Milestones",
    "OneShot",
    "RandomTicket",
    "Reinitialised",
    "Rewind",
    "Shuffled",
    "Smaller",
    "Store",
    "Ticket",
    "Transfer",
    "Trial",
    "Twin",
    "fine_tune",
    "milestones",
    "rewind_rate",
    "rewind_to",
]
