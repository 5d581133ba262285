"""Scores of single weights. Larger means keep, everywhere.

A criterion is a frozen dataclass: `criterion(weight, stats) -> scores`, all in the shape of the layer's
matrix `[out, in]`. It knows no module, no loop and no sparsity, and says in `needs` what must have been
measured.
"""

from secateur.criteria.activation import RIA, Wanda
from secateur.criteria.base import Criterion
from secateur.criteria.curvature import OBD, GraSP
from secateur.criteria.gradient import SNIP, Taylor, TaylorGroup, TaylorSquared
from secateur.criteria.magnitude import Magnitude, Random
from secateur.criteria.synflow import SynFlow

__all__ = [
    "OBD",
    "RIA",
    "SNIP",
    "Criterion",
    "GraSP",
    "Magnitude",
    "Random",
    "SynFlow",
    "Taylor",
    "TaylorGroup",
    "TaylorSquared",
    "Wanda",
]
