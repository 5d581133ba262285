"""Rules for the operators of ATen, by family; `rule` adds one."""

from secateur.graph.rules import (
    attention,
    contractions,
    convolutions,
    indexing,
    joining,
    norms,
    pointwise,
    recurrent,
    reductions,
    spatial,
    views,
)
from secateur.graph.rules.base import RULES, Call, Rule, rule

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "attention",
    "contractions",
    "convolutions",
    "indexing",
    "joining",
    "norms",
    "pointwise",
    "recurrent",
    "reductions",
    "rule",
    "spatial",
    "views",
]
