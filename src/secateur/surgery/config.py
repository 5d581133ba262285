"""A configuration that describes the smaller model, found by building from it.

Which field of a configuration gives which size is known to the model's constructor alone. So fields are
tried: one whose value is a number that changes gets the new one, and stays so if a model built from the
configuration, on the meta device, comes nearer to the smaller one. Only an exact match counts: of all shapes,
of the numbers that the modules' code was seen to use, and of all their floating-point settings.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.graph import Graph, axes
from secateur.graph.axes import Dim
from secateur.graph.plan import Sizes
from secateur.surgery.cuts import Attribute

Shapes = Mapping[str, tuple[int, ...]]
Number = tuple[str, str, int | None]  # module, attribute, entry
_MOST_PAIRS = 200
_DEEPEST = 3  # configurations inside configurations


@dataclass(frozen=True)
class Wanted:
    """What a model built from a configuration must have: shapes of its state dict, numbers in its modules."""

    shapes: Shapes
    numbers: Mapping[Number, float]


def config_edits(
    graph: Graph, size: Sizes, cut: Collection[str], following: Sequence[Attribute]
) -> tuple[list[Attribute], str | None]:
    """Fields to change, and why the configuration cannot express the model, None if it can.

    Without a configuration that can rebuild the model there is nothing to change and nothing to say.

    Args:
        graph: of the dense model.
        size: of dimensions afterwards.
        cut: names of the stored tensors that are cut.
        following: numbers that change with the cut.
    """
    model: Any = graph.model
    config = vars(model).get("config")
    if not _is_config(config):
        return [], None
    state = model.state_dict(keep_vars=True)
    saved = {id(t) for t in state.values()}
    for stored in graph.types.stored.values():
        if stored.name in cut and id(stored.tensor) not in saved:
            return [], f"{stored.name} is computed anew by its constructor, for other positions"
    dense = Wanted({n: tuple(t.shape) for n, t in state.items()}, _numbers(model, graph))
    if missed := _missed(model, config, dense):
        return [], f"it does not rebuild the model as it is ({sorted(map(str, missed))[0]})"
    trial = copy.deepcopy(config)
    numbers = dict(dense.numbers)
    changes = _changes(graph, size)
    for a in following:
        if a.module == "" and a.steps[:1] == ("config",) and a.index is None:
            setattr(_inner(trial, a.steps[1:]), a.name, a.new)
        elif not a.steps:
            numbers[a.module, a.name, a.index] = a.new
            changes.setdefault(a.old, set()).add(a.new)
    edits = _search(model, trial, Wanted(_shapes_after(graph, size), numbers), changes)
    if edits is None:
        return [], "no values of its fields give these sizes"
    return [
        Attribute("", ("config", *steps), name, None, getattr(_inner(config, steps), name), new)
        for (steps, name), new in edits.items()
    ], None


def _numbers(model: nn.Module, graph: Graph) -> dict[Number, float]:
    """Integers that the traced code used, and floating-point settings, of all modules."""
    found: dict[Number, float] = {}
    for attr in graph.used_numbers():
        owner = graph.traced.owners[attr.owner]
        if owner.is_module:
            found[owner.module, attr.name, attr.index] = graph.traced.ledger.values[attr]
    for name, module in model.named_modules():
        found |= {(name, k, None): v for k, v in vars(module).items() if type(v) is float}
    return found


def _is_config(config: Any) -> bool:
    return any(c.__name__ in ("PretrainedConfig", "PreTrainedConfig") for c in type(config).__mro__)


def _shapes_after(graph: Graph, size: Sizes) -> Shapes:
    """Shapes of the smaller model's state dict."""
    new = {id(s.tensor): tuple(size(d) for d in s.type.dims) for s in graph.types.stored.values()}
    state = graph.model.state_dict(keep_vars=True)
    return {name: new.get(id(t), tuple(t.shape)) for name, t in state.items()}


def _changes(graph: Graph, size: Sizes) -> dict[float, set[float]]:
    """New sizes by old size, of every run of factors in every dimension."""
    found: dict[float, set[float]] = {}
    for stored in graph.types.stored.values():
        for dim in stored.type.dims:
            for run in _runs(dim):
                old, new = axes.extent(run), size(run)
                if old != new:
                    found.setdefault(old, set()).add(new)
    return found


def _runs(dim: Dim) -> Iterator[Dim]:
    factors = axes.atoms(dim)
    for i, j in itertools.combinations(range(len(factors) + 1), 2):
        yield tuple(factors[i:j])
    for atom in factors:
        if atom.terms is not None:
            for term in axes.terms_of(atom):
                yield from _runs(term)


Field = tuple[tuple[str, ...], str]


def _fields(config: Any, steps: tuple[str, ...] = ()) -> Iterator[tuple[Field, float]]:
    for name, value in list(vars(config).items()):
        if type(value) in (int, float):
            yield (steps, name), value
        elif _is_config(value) and len(steps) < _DEEPEST:
            yield from _fields(value, (*steps, name))


def _inner(config: Any, steps: tuple[Any, ...]) -> Any:
    for step in steps:
        config = getattr(config, step)
    return config


def _search(
    model: nn.Module, trial: Any, wanted: Wanted, changes: Mapping[float, set[float]]
) -> dict[Field, float] | None:
    """Values that give what is wanted; one field at a time, two where one alone does not help."""
    edits: dict[Field, float] = {}
    left = _missed(model, trial, wanted)
    while left:
        options = [
            (f, new) for f, old in _fields(trial) if f not in edits for new in sorted(changes.get(old, ()))
        ]
        pairs = [p for p in itertools.combinations(options, 2) if p[0][0] != p[1][0]]
        best = left
        for choice in itertools.chain(((option,) for option in options), pairs[:_MOST_PAIRS]):
            if len(choice) > 1 and len(best) < len(left):
                break  # one field alone helped
            candidate = _with(trial, choice)
            now = _missed(model, candidate, wanted) if candidate is not None else None
            # What was right in the code stays right: shapes alone do not tell heads from their size.
            if now is not None and len(now) < len(best) and not any(isinstance(k, tuple) for k in now - left):
                best, chosen, config = now, choice, candidate
        if best is left:
            return None
        trial, left = config, best
        edits |= dict(chosen)
    return edits if left is not None else None


def _with(config: Any, choice: Iterable[tuple[Field, float]]) -> Any:
    """A copy with some fields set; None if the configuration refuses."""
    changed = copy.deepcopy(config)
    for (steps, name), new in choice:
        try:
            setattr(_inner(changed, steps), name, new)
        except Exception:  # configurations check some fields as they are set
            return None
    return changed


def _missed(model: nn.Module, config: Any, wanted: Wanted) -> set[Any] | None:
    """What a model built from `config` does not have as wanted; None if it cannot be built."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fresh = type(model)(copy.deepcopy(config))
    except Exception:
        return None
    got = {n: tuple(t.shape) for n, t in fresh.state_dict().items()}
    missed: set[Any] = {n for n in wanted.shapes.keys() | got.keys() if wanted.shapes.get(n) != got.get(n)}
    modules = dict(fresh.named_modules())
    for key, value in wanted.numbers.items():
        module, name, index = key
        found = vars(modules[module]).get(name) if module in modules else None
        if index is not None:
            found = found[index] if isinstance(found, tuple | list) and index < len(found) else None
        if found != value:
            missed.add(key)
    return missed
