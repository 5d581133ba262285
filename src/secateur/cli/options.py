"""Options that choose weights and how they are pruned, and what their words mean."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import choices
from secateur.core.names import Where

Globs = list[str] | None
Include = Annotated[Globs, typer.Option(help="Only weights whose name matches this glob; repeatable.")]
Exclude = Annotated[Globs, typer.Option(help="No weights whose name matches this glob; repeatable.")]
Also = Annotated[
    Globs,
    typer.Option(help="Add these whatever their role: head, embeddings, norms, biases; repeatable."),
]
MethodName = Annotated[
    choices.Method, typer.Option("--method", help="The criterion: what a weight is worth.")
]
PatternText = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="unstructured, row, N:M such as 2:4, or a block such as 4x1. By default row for wanda and "
        "unstructured for all others.",
    ),
]


def where_of(include: Globs, exclude: Globs, also: Globs) -> Where | None:
    """The filter; None if no option was given."""
    if not (include or exclude or also):
        return None
    return Where(tuple(include) if include else "*", tuple(exclude or ()), tuple(also or ()))
