"""Words of the command line and the objects that they name. The only place where names become objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

from secateur import allocation, criteria, scoring, selection, solvers
from secateur.core.errors import SecateurError
from secateur.levels import Measured
from secateur.patterns import NM, Block, Pattern, PerRow, Unstructured
from secateur.shrink import Repair
from secateur.stats import ExactDiagonal, HutchinsonDiagonal

METHODS: dict[str, Callable[[int], criteria.Criterion]] = {
    "magnitude": lambda seed: criteria.Magnitude(),
    "random": lambda seed: criteria.Random(seed),
    "wanda": lambda seed: criteria.Wanda(),
    "ria": lambda seed: criteria.RIA(),
    "taylor": lambda seed: criteria.Taylor(),
    "taylor-squared": lambda seed: criteria.TaylorSquared(),
    "taylor-group": lambda seed: criteria.TaylorGroup(),
    "obd": lambda seed: criteria.OBD(),
    "obd-hutchinson": lambda seed: criteria.OBD(HutchinsonDiagonal(seed=seed)),
    "obd-exact": lambda seed: criteria.OBD(ExactDiagonal()),
    "snip": lambda seed: criteria.SNIP(),
    "grasp": lambda seed: criteria.GraSP(),
    "synflow": lambda seed: criteria.SynFlow(),
}
SOLVERS: dict[str, Callable[[], solvers.Solver]] = {
    "sparsegpt": solvers.SparseGPT,
    "alps": solvers.ALPS,
}
ALLOCATIONS: dict[str, allocation.Allocation] = {
    "uniform": allocation.uniform,
    "global": allocation.global_,
    "erk": allocation.erk,
    "lamp": allocation.lamp,
    "owl": allocation.owl,
    "threshold": allocation.threshold,
}

GROUP_METHODS: dict[str, Callable[[int], criteria.Criterion | scoring.GroupCriterion]] = {
    "magnitude": lambda seed: criteria.Magnitude(),
    "random": lambda seed: criteria.Random(seed),
    "taylor": lambda seed: criteria.Taylor(),
    "taylor-joint": lambda seed: scoring.JointTaylor(),
    "obd": lambda seed: criteria.OBD(),
    "wanda": lambda seed: criteria.Wanda(),
    "fpgm": lambda seed: scoring.FPGM(),
    "bn-scale": lambda seed: scoring.BNScale(),
    "activation": lambda seed: scoring.ActivationNorm(),
    "apoz": lambda seed: scoring.APoZ(),
    "head-importance": lambda seed: scoring.HeadImportance(normalise=None),
    "expert-output": lambda seed: scoring.ExpertOutput(),
}
SCOPES: dict[str, Callable[[], selection.Scope]] = {
    "isomorphic": selection.Isomorphic,
    "global": selection.Global,
    "global-per-cost": lambda: selection.Global(per_cost=True),
    "local": selection.Local,
}

REPAIRS: dict[str, Repair | None] = {"parallel": "parallel", "sequential": "sequential", "none": None}

# Enumerations, so that the help text lists the words.
Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
SolverName = Enum("SolverName", {name: name for name in SOLVERS}, type=str)  # type: ignore[misc]
Pruner = Enum("Pruner", {name: name for name in (*METHODS, *SOLVERS)}, type=str)  # type: ignore[misc]

GroupMethod = Enum("GroupMethod", {name: name for name in GROUP_METHODS}, type=str)  # type: ignore[misc]
RepairName = Enum("RepairName", {name: name for name in REPAIRS}, type=str)  # type: ignore[misc]
ScopeName = Enum("ScopeName", {name: name for name in SCOPES}, type=str)  # type: ignore[misc]


def pattern(text: str | None, method: str) -> Pattern:
    """`unstructured`, `row`, `2:4` or `4x1`; None is `row` for Wanda, as in its paper, else unstructured."""
    if text is None:
        return PerRow() if method == "wanda" else Unstructured()
    if text == "unstructured":
        return Unstructured()
    if text == "row":
        return PerRow()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    raise SecateurError(
        f"--pattern is unstructured, row, N:M such as 2:4, or ROWSxCOLUMNS such as 4x1; got {text!r}."
    )


def allocation_of(text: str) -> allocation.Allocation:
    """A name, or a file that `secateur allocate` wrote."""
    if text in ALLOCATIONS:
        return ALLOCATIONS[text]
    if text.endswith(".json"):
        return Measured.load(text)
    raise SecateurError(
        f"--allocation is {', '.join(ALLOCATIONS)}, or a .json file of `secateur allocate`; got {text!r}."
    )


def sparsity(value: float | None, chosen: Pattern) -> float:
    """The sparsity asked for; a pattern N:M brings its own."""
    if value is None and isinstance(chosen, NM):
        return 1 - chosen.n / chosen.m
    if value is None:
        raise SecateurError("--sparsity is needed: the fraction of weights to remove, between 0 and 1.")
    return value
