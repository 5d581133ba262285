"""The graph as a picture: groups and the tensors that they tie together, in the language of Graphviz."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_COLOURS = {
    "width": "#d9d9d9",
    "neurons": "#b3e2cd",
    "filters": "#b3e2cd",
    "heads": "#cbd5e8",
    "kv_groups": "#cbd5e8",
    "queries": "#e6f5c9",
    "head_dim": "#fff2ae",
    "experts": "#f4cae4",
}
_DASHED = {"out": "solid", "in": "solid", "along": "dotted"}


def dot(groups: Iterable[Any], share: float) -> str:
    """DOT text: an ellipse for each group, a box for each tensor, and an edge for each place.

    An edge points from the tensors that produce the axis, through the group, to those that consume it; dotted
    lines lead to what only follows. Frozen groups are dashed.
    """
    lines = [
        "digraph axes {",
        "  rankdir=LR; node [fontname=Helvetica fontsize=10]; edge [fontsize=8];",
        f"  label={json.dumps(f'{share:.1%} of the parameters lie in a group that can be cut')};",
    ]
    tensors: dict[str, None] = {}
    for i, group in enumerate(groups):
        style = "filled" if group.frozen is None else "dashed"
        colour = _COLOURS.get(group.kind, "#fdcdac")
        text = json.dumps(f"{group.kind} {group.size}")
        lines.append(f'  g{i} [label={text} style={style} fillcolor="{colour}"];')
        for member in group.members:
            tensors[member.tensor] = None
            name = json.dumps(member.tensor)
            ends = f"g{i} -> {name}" if member.role == "in" else f"{name} -> g{i}"
            head = " arrowhead=none" if member.role == "along" else ""
            lines.append(f"  {ends} [label={member.dim} style={_DASHED[member.role]}{head}];")
    lines += [f"  {json.dumps(name)} [shape=box];" for name in tensors]
    return "\n".join([*lines, "}"]) + "\n"
