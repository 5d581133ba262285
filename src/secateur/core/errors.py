"""One class for each kind of mistake; all are `SecateurError`, a `ValueError`.

An error leaves the model bit-identical: everything is checked and computed before anything is written.
"""

from __future__ import annotations


class SecateurError(ValueError):
    """Base of every error that Secateur raises on bad input."""


class SparsityError(SecateurError):
    """A sparsity outside [0, 1], or missing where it is needed."""


class ScheduleError(SecateurError):
    """A schedule that makes no sense, or that training leaves unfinished."""


class BudgetError(SecateurError):
    """The asked total cannot be met by the layers, pattern and allocation given."""


class PatternError(SecateurError):
    """A pattern does not fit a weight's shape, or cannot have the asked sparsity."""


class SelectionError(SecateurError):
    """Nothing to prune, or a name pattern that matches nothing."""


class StatsError(SecateurError):
    """A statistic is missing, undefined for a layer, or cannot be measured with the data given."""


class NonFiniteError(SecateurError):
    """NaN or infinite weights, gradients or scores."""


class MaskError(SecateurError):
    """Masks that do not fit a model, or a masked weight that is not zero."""


class SurgeryError(SecateurError):
    """A structured removal that the model's code cannot follow, or that is for another model."""


class ArtifactError(SecateurError):
    """A missing, corrupt or foreign file or folder."""


class StreamError(SecateurError):
    """A checkpoint that cannot be read, or a model that cannot be run, block by block."""
