"""The form of recipes as a JSON Schema, for editors that complete and check YAML while it is written.

Made from the constructors that recipes may name, so that it knows what they know. It checks names, forms and
plain types; what only values tell (a schedule that ends before it begins) is found when a recipe is read.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from secateur import allocation, training
from secateur.core.names import Where
from secateur.prune import prune_
from secateur.recipe import ALLOCATIONS, BROUGHT, CONSTRUCTORS, METHODS, Recipe, Training

Schema = dict[str, Any]

_SCALARS: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
    type(None): {"type": "null"},
}


def recipe_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of recipes."""
    method = {"oneOf": [_one(name) for name in METHODS] + [{"type": "null"}]}
    train = _keywords(Training) | {"type": ["object", "null"]}
    distill = _keywords(training.Distill) | {"type": ["object", "null"]}
    train["properties"] |= {"method": method, "distill": distill}
    recipe = _keywords(Recipe)
    recipe["properties"]["eval"] = recipe["properties"].pop("evaluate")
    recipe["properties"] |= {"prune": _keywords(prune_) | {"type": ["object", "null"]}, "train": train}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Secateur recipe",
        **recipe,
        "anyOf": [{"required": ["prune"]}, {"required": ["train"]}],
        "$defs": {name: _arguments(f) for name, f in CONSTRUCTORS.items()}
        | {name: _keywords(f) | {"type": ["object", "null"]} for name, f in METHODS.items()},
    }


def objects_of(parameter: str, owner: str = "") -> list[str]:
    """The names that a recipe may give for a parameter that is an object; none where it is not one.

    `owner`: the function that takes it.
    """
    criteria = [n for n, f in CONSTRUCTORS.items() if f.__module__.startswith("secateur.criteria")]
    if parameter == "criterion" and owner == prune_.__name__:
        solvers = [n for n, f in CONSTRUCTORS.items() if f.__module__.startswith("secateur.solvers")]
        return criteria + solvers
    schedules = [n for n, f in CONSTRUCTORS.items() if f.__module__ == "secateur.schedules" and n != "every"]
    return {
        "criterion": criteria,
        "start": criteria,
        "schedule": schedules,
        "when": ["every"],
        "pattern": [n for n, f in CONSTRUCTORS.items() if f.__module__ == "secateur.patterns"],
        "allocation": [*ALLOCATIONS, "OWL", "Threshold", "custom", "at_least"],
        "reconstruct": ["Reconstruct"],
        "where": ["Where"],
        "soft": ["Soft"],
        "rule": ["RigL", "SET"],
        "penalty": ["L1", "L2"],
        "phases": ["Phases", "phases"],
    }.get(parameter, [])


def _parameters(f: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    brought = BROUGHT if f is not Recipe else ()
    return {n: p for n, p in inspect.signature(f).parameters.items() if n not in brought}


def _needed(f: Callable[..., Any]) -> list[str]:
    return [n for n, p in _parameters(f).items() if p.default is p.empty]


def _keywords(f: Callable[..., Any]) -> Schema:
    """Arguments by name."""
    made: Any = f
    hints = get_type_hints(made.__init__ if isinstance(f, type) else f)
    properties = {n: _value(n, hints.get(n, Any), f.__name__) for n in _parameters(f)}
    properties = {n: value for n, value in properties.items() if value}  # the others have no form in YAML
    needed = {"required": _needed(f)} if _needed(f) else {}
    return {"type": "object", "properties": properties, **needed, "additionalProperties": False}


def _arguments(f: Callable[..., Any]) -> Schema:
    """Arguments as `secateur.recipe.built` takes them: by name, by position, one alone, or none."""
    if f is allocation.custom:
        return {"type": "object", "additionalProperties": {"type": "number"}}
    named, needed = _keywords(f), _needed(f)
    free = [n for n, p in _parameters(f).items() if p.kind is not p.KEYWORD_ONLY]
    values = [value for n, value in named["properties"].items() if n in free]
    forms = [named]
    if f is training.Phases:
        forms.append({"type": "array", "items": {"type": "integer"}})
    elif f is not Where and values and set(needed) <= set(free):
        list_of: Schema = {"prefixItems": values, "minItems": len(needed), "maxItems": len(values)}
        forms.append({"type": "array", **list_of})
        forms += [values[0]] if len(needed) <= 1 else []
    return {"anyOf": [*forms, *([] if needed else [{"type": "null"}])]}


def _value(name: str, hint: Any, owner: str) -> Schema:
    """What may stand for a parameter."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if names := objects_of(name, owner):
        alone = [n for n in names if n in ALLOCATIONS or not _needed(CONSTRUCTORS[n])]
        forms: list[Schema] = [{"enum": alone}] if alone else []
        forms += [_one(n) for n in names if n in CONSTRUCTORS]
        return {"anyOf": [*forms, {"type": "null"}] if _optional(hint) else forms}
    return _plain(hint)


def _plain(hint: Any) -> Schema:
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        known = [_plain(h) for h in inner if h is type(None) or _plain(h)]
        return {"anyOf": known} if known != [_SCALARS[type(None)]] and known else {}
    if origin in (tuple, Collection):
        return {"anyOf": [{"type": "array", "items": _plain(inner[0])}, _plain(inner[0])]}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _plain(inner[1])}
    return {}


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _one(name: str) -> Schema:
    """A mapping of one name to its arguments."""
    return {
        "type": "object",
        "properties": {name: {"$ref": f"#/$defs/{name}"}},
        "required": [name],
        "additionalProperties": False,
    }
