"""Gates on whole blocks: on the weights through which each adds to the hidden state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from secateur.core.errors import SelectionError
from secateur.core.layout import layout_of
from secateur.core.names import Target, matches
from secateur.graph import Graph, Group
from secateur.layers.finding import require, survey
from secateur.layers.proof import check_outputs, outputs
from secateur.scoring.base import Place


@dataclass(frozen=True)
class Gated:
    """A block that may close.

    Attributes:
        name: of the module.
        stack: of the list that it is in.
        groups: names of the groups whose units lie in it.
        writers: weights and biases through which it adds to the hidden state.
    """

    name: str
    stack: str
    groups: tuple[str, ...]
    writers: tuple[Target, ...]


def gated_blocks(
    model: nn.Module, graph: Graph, names: Iterable[str], groups: Sequence[tuple[Group, list[Place]]]
) -> tuple[Gated, ...]:
    """The blocks of these names or patterns, proven on the example to do nothing when they write zeros.

    A pattern stands for the blocks that can be dropped, the outer ones where they lie in one another.

    Raises `SelectionError` for a block that cannot be dropped, and for one that does something even so: one
    that normalises its sum.
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    if not asked:
        return ()
    args, kwargs = graph.example
    found = require(model, survey(model, args, kwargs))
    known = {block.name: (stack.name, block.reason) for stack in found for block in stack.blocks}
    names = _chosen(asked, {name: reason for name, (_, reason) in known.items()})
    blocks = tuple(_gated(model, graph, name, known[name][0], groups) for name in names)
    if _acts(model, graph, blocks):
        odd = next((b.name for b in blocks if _acts(model, graph, (b,))), blocks[0].name)
        raise SelectionError(
            f"{odd} changes the hidden state even when what it adds is zero, as blocks do that normalise the "
            "sum, so no gate on its weights can close it: leave it out."
        )
    return blocks


def _chosen(asked: Sequence[str], known: Mapping[str, str | None]) -> list[str]:
    """Names of blocks; `known`: why each cannot be dropped, if so."""
    chosen: dict[str, None] = {}
    for name in asked:
        if known.get(name):
            raise SelectionError(f"{name} cannot be dropped: {known[name]}.")
        found = [n for n, reason in known.items() if not reason and matches(n, name)]
        if not found:
            some = ", ".join([n for n, reason in known.items() if not reason][:3])
            raise SelectionError(f"No block that can be dropped is called {name!r}; there are {some}.")
        chosen |= dict.fromkeys(found)
    return [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]


def _gated(
    model: nn.Module, graph: Graph, name: str, stack: str, groups: Sequence[tuple[Group, list[Place]]]
) -> Gated:
    inside = f"{name}."
    mine = tuple(g.name for g, users in groups if all(p.tensor.startswith(inside) for p in users))
    writers: dict[int, Target] = {}
    for group in graph.all_groups:
        roles = {m.role for m in group.members if m.tensor.startswith(inside)}
        if not {"in", "out"} <= roles or all(m.tensor.startswith(inside) for m in group.members):
            continue  # not the hidden state, which runs through the blocks: they read it and write it
        for member in group.members:
            if member.role == "out" and member.tensor.startswith(inside):
                owner = member.tensor.rpartition(".")[0]
                module = model.get_submodule(owner)
                for attribute, parameter in module.named_parameters(recurse=False):
                    if attribute in (member.tensor.rpartition(".")[2], "bias"):
                        layout = layout_of(module, attribute)
                        writers[id(parameter)] = Target(f"{owner}.{attribute}", module, attribute, layout)
    if not writers:
        raise SelectionError(
            f"{name} has no weight of which it is known that it writes the hidden state, whose width may be "
            "that of the model's input: leave it out."
        )
    return Gated(name, stack, mine, tuple(writers.values()))


@torch.no_grad()
def _acts(model: nn.Module, graph: Graph, blocks: Sequence[Gated]) -> bool:
    """Whether the model is another one when blocks write zeros than when they are bypassed."""
    args, kwargs = graph.example
    expected = outputs(model, args, kwargs, [block.name for block in blocks])
    with ExitStack() as stack:
        for block in blocks:
            for target in block.writers:
                weight = target.weight.detach()
                stack.callback(weight.copy_, weight.clone())
                weight.zero_()
        return bool(check_outputs(model, args, kwargs, expected))
