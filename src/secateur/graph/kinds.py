"""What to call an axis, from the parts it was seen to play. Reports and defaults alone depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from secateur.graph.axes import Axis

Roles = Mapping[str, set[str | None]]

INTERIOR = ("neurons", "filters", "heads", "kv_groups", "queries", "head_dim", "groups")
"""Kinds inside one block: cutting them leaves the width that runs through the model alone."""


def kind_of(roles: Roles, others: Iterable[Roles], convolutional: bool) -> str:
    """The kind of an axis.

    Args:
        roles: parts that the axis plays, each with the parameters concerned.
        others: parts of the axes that stand beside it in products.
        convolutional: whether its producers are convolutions.
    """
    others = list(others)
    producers = {root for root in roles.get("out", ()) if root}
    consumers = {root for root in roles.get("in", ()) if root}
    if "choice" in roles:
        return "experts"
    if "groups" in roles:
        return "groups"
    if "batch" in roles:
        if "repeat" in roles and any("batch" in other for other in others):
            return "queries"
        repeated = any("repeat" in other and "batch" in other for other in others)
        return "kv_groups" if repeated else "heads"
    wide = "embedding" in roles or "norm" in roles or len(producers) >= 3
    inside_heads = any("batch" in other for other in others)
    if len(producers) >= 2 and len(consumers) >= 2 and wide and not inside_heads:
        return "width"
    if ("dot" in roles or "value" in roles) and (inside_heads or len(producers) <= 3):
        return "head_dim"
    if "repeat" in roles:
        return "repeats"
    if convolutional:
        return "filters" if len(producers) < 2 else "width"
    return "neurons" if len(producers) < 3 else "width"


def roles_beside(axis: Axis, beside: Iterable[Axis], roles: Mapping[Axis, Roles]) -> list[Roles]:
    """Parts of other axes."""
    return [roles[other] for other in beside if other is not axis and other in roles]
