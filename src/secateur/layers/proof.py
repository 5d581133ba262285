"""Proof that a model without blocks is the model with them bypassed, on an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import SelectionError
from secateur.layers.changes import Cut, Edit, Journal, above, lengths
from secateur.layers.config import Dialect, settled
from secateur.layers.tensors import bypassed, call, inference


def outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], without: Iterable[str] = ()
) -> dict[Any, Tensor]:
    """Tensors that the model returns, by their place in the output."""
    with inference(model), bypassed(model, without):
        return dict(_leaves(call(model, args, kwargs), ()))


def check_outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Mapping[Any, Tensor]
) -> str:
    """How the output differs from what is expected; empty if it does not."""
    try:
        return _difference(expected, outputs(model, args, kwargs))
    except Exception as error:
        return f"it fails ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def prove(journal: Journal, cuts: Sequence[Cut], check: Callable[[], str]) -> list[Edit]:
    """Update the attributes that count blocks such that the output is the expected one; else raise."""
    problem = ""
    owners = [above(cut.stack)[-1:] for cut in cuts]
    everything = [above(cut.stack) for cut in cuts]
    tried: list[list[Edit]] = []
    nobody: list[list[str]] = [[] for _ in cuts]
    for holders in (owners, everything, nobody):
        edits = [e for cut, around in zip(cuts, holders, strict=True) for e in lengths(journal, cut, around)]
        if edits in tried:
            continue
        tried.append(edits)
        mark = journal.mark()
        for edit in edits:
            journal.edit(edit)
        found = check()
        if not found:
            return edits
        problem = problem or found
        journal.undo(mark)
    raise SelectionError(
        f"Without these blocks the model is not what it is with them bypassed: {problem}. Its code depends "
        "on how many blocks there are, or on their places; drop others."
    )


def follow(
    journal: Journal,
    cuts: Sequence[Cut],
    held: Mapping[str, Any],
    known: Mapping[str, Dialect],
    check: Callable[[], str],
) -> list[Edit]:
    """Settings around the blocks that follow from the configuration, where the output stays what it is."""
    mark = journal.mark()
    done = []
    for name, config in held.items():
        for edit in settled(journal, name, config, known[name]):
            if not any(edit.module.startswith(f"{cut.stack}.") for cut in cuts):
                journal.edit(edit)
                done.append(edit)
    if done and check():
        journal.undo(mark)
        return []
    return done


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))


def _difference(expected: Mapping[Any, Tensor], got: Mapping[Any, Tensor]) -> str:
    """How outputs differ; what the model returns for each block, such as caches, cannot be compared."""
    places = [
        {path[0]: [p for p in side if p[:1] == path[:1]] for path in side if path} for side in (expected, got)
    ]
    uneven = {key for key in places[0] | places[1] if places[0].get(key) != places[1].get(key)}
    compared = [path for path in expected if not path or path[0] not in uneven]
    if not compared:
        return "it returns nothing that can be compared"
    for path in compared:
        a, b = expected[path], got.get(path)
        where = ".".join(map(str, path)) or "its output"
        if b is None or a.shape != b.shape or a.dtype != b.dtype:
            return f"{where} has another shape"
        if a.is_floating_point() and bool(a.isnan().any()):
            return f"{where} holds NaN, with which nothing can be proven"
        if not torch.equal(a, b):
            return f"{where} differs by {float((a.double() - b.double()).abs().max()):.2g}"
    return ""
