"""Repair after structured removal: least squares for the weights on the inputs that are kept.

Where inputs of a layer are removed, those that stay can make up for much of them, since activations depend
on each other. `reconstruct` solves that for one layer from the moments of its inputs; `repair_` does it for
a model.
"""

from secateur.reconstruct.consumers import Consumer, consumers_of
from secateur.reconstruct.measure import Measured, Tokens, cross_moments, moments
from secateur.reconstruct.moments import CrossMoments, Moments
from secateur.reconstruct.repair import LayerRepair, RepairReport, repair_
from secateur.reconstruct.solve import Reconstructed, reconstruct
from secateur.reconstruct.twin import masked_twin

__all__ = [
    "Consumer",
    "CrossMoments",
    "LayerRepair",
    "Measured",
    "Moments",
    "Reconstructed",
    "RepairReport",
    "Tokens",
    "consumers_of",
    "cross_moments",
    "masked_twin",
    "moments",
    "reconstruct",
    "repair_",
]
