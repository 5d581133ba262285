"""How much to remove from each layer, decided on data, for one-pass pruning by a solver."""

from secateur.levels.by_error import by_error
from secateur.levels.by_search import by_search
from secateur.levels.measured import Measured, Tried

__all__ = ["Measured", "Tried", "by_error", "by_search"]
