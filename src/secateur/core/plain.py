"""Dataclasses from plain data, as JSON gives it: checked against their type hints, nothing executed."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from secateur.core.errors import ArtifactError


def fields_of(cls: Any, data: Any, leave: Sequence[str] = (), where: str = "") -> dict[str, Any]:
    """Values for the fields of a dataclass from a mapping, without those in `leave`.

    Fields with a default may be missing; keys that are no fields are left out.

    Raises `ArtifactError` for what is missing or of another type, and says where.
    """
    if not isinstance(data, Mapping):
        raise ArtifactError(f"{where or 'The report'} is not a mapping: {str(data)[:60]!r}.")
    hints = get_type_hints(cls)
    out = {}
    for field in fields(cls):
        place = f"{where}.{field.name}".lstrip(".")
        if field.name in leave:
            continue
        if field.name in data:
            out[field.name] = value_of(hints[field.name], data[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ArtifactError(f"{place} is missing.")
    return out


def value_of(hint: Any, data: Any, where: str = "") -> Any:
    """`data` as a value of a type: a dataclass, a tuple, a mapping with names as keys, None, or a scalar."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return hint(**fields_of(hint, data, where=where))
    if origin in (Union, types.UnionType):
        some = [h for h in inner if h is not type(None)]
        return None if data is None and len(some) < len(inner) else value_of(some[0], data, where)
    if origin is tuple and isinstance(data, list | tuple):
        if inner[-1] is ...:
            return tuple(value_of(inner[0], x, f"{where}[{i}]") for i, x in enumerate(data))
        if len(inner) == len(data):
            return tuple(
                value_of(h, x, f"{where}[{i}]") for i, (h, x) in enumerate(zip(inner, data, strict=True))
            )
    if origin is not None and issubclass(origin, Mapping) and isinstance(data, Mapping):
        return {str(k): value_of(inner[1], x, f"{where}.{k}") for k, x in data.items()}
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint in (int, str, bool) and type(data) is hint:
        return data
    raise ArtifactError(
        f"{where or 'A value'} is {str(data)[:60]!r}, which is no {getattr(hint, '__name__', hint)}."
    )
