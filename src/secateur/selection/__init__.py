"""Which units of structured groups to keep, so that a budget holds."""

from secateur.selection.choose import Choice, choose
from secateur.selection.constraints import Constraint, GroupLike, constraints
from secateur.selection.scopes import Global, Isomorphic, Local, Scope, signatures

__all__ = [
    "Choice",
    "Constraint",
    "Global",
    "GroupLike",
    "Isomorphic",
    "Local",
    "Scope",
    "choose",
    "constraints",
    "signatures",
]
