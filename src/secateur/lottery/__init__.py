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
from secateur.lottery.connectivity import (
    LinearPath,
    Overlap,
    barriers,
    instability,
    kept_paths,
    linear_path,
    overlaps,
)
from secateur.lottery.experiment import Lottery
from secateur.lottery.fit import Fit, Milestones, milestones
from secateur.lottery.rewind import Rewind, fine_tune, rewind_rate, rewind_to
from secateur.lottery.store import Experiment, Finished, Store
from secateur.lottery.table import Summary, TicketTable
from secateur.lottery.trial import Trial

__all__ = [
    "AtInit",
    "Branch",
    "Experiment",
    "Finished",
    "Fit",
    "LinearPath",
    "Lottery",
    "Milestones",
    "OneShot",
    "Overlap",
    "RandomTicket",
    "Reinitialised",
    "Rewind",
    "Shuffled",
    "Smaller",
    "Store",
    "Summary",
    "Ticket",
    "TicketTable",
    "Transfer",
    "Trial",
    "Twin",
    "barriers",
    "fine_tune",
    "instability",
    "kept_paths",
    "linear_path",
    "milestones",
    "overlaps",
    "rewind_rate",
    "rewind_to",
]
