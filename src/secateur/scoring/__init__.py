"""Scores of the units of structured groups. Larger means keep, everywhere.

A group criterion is a frozen dataclass: `criterion(model, groups, labels, batches, loss)` gives each group's
`Scores`. `GroupScore` makes one of any criterion of weights.
"""

from secateur.scoring.base import GroupCriterion, Scores
from secateur.scoring.entry import score_groups
from secateur.scoring.experts import ExpertOutput
from secateur.scoring.gates import HeadImportance, JointTaylor
from secateur.scoring.slices import FPGM, BNScale
from secateur.scoring.traffic import ActivationNorm, APoZ
from secateur.scoring.weights import GroupScore

__all__ = [
    "FPGM",
    "APoZ",
    "ActivationNorm",
    "BNScale",
    "ExpertOutput",
    "GroupCriterion",
    "GroupScore",
    "HeadImportance",
    "JointTaylor",
    "Scores",
    "score_groups",
]
