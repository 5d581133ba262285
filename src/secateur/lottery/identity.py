"""What decides a result, as text and as a digest: settings, functions by source, data by content."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.record import versions


def describe(value: Any) -> Any:
    """Plain data that differs where results may.

    Dataclasses by their fields, tensors by a digest of their content, functions by name, source, defaults and
    what they close over, if that cannot change: numbers, texts, tensors, functions. What a function reads
    from its module is not seen; give an experiment another name when that changes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        content = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
        return f"{value.dtype} {list(value.shape)} {content}"
    if is_dataclass(value) and not isinstance(value, type):
        return {"of": _name(type(value)), **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [describe(v) for v in value]
    if isinstance(value, functools.partial):
        return {"of": describe(value.func), "args": describe(value.args), "with": describe(value.keywords)}
    if inspect.isroutine(value) or isinstance(value, type):
        known = {"of": _name(value), "source": _source(value), "defaults": describe(_defaults(value))}
        return known | {"closes over": _closure(value)}
    return {"of": _name(type(value)), "is": repr(value)} if _says_what_it_is(value) else _name(type(value))


def digest(data: Any) -> str:
    """SHA-256 of plain data and of the versions of secateur and torch."""
    deciding = {name: version for name, version in versions().items() if name in ("secateur", "torch")}
    text = json.dumps([data, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(value: Any) -> str:
    module, name = getattr(value, "__module__", "") or "", getattr(value, "__qualname__", repr(value))
    # A script's functions keep their identity when it is imported.
    return name if module == "__main__" else f"{module}.{name}"


def _source(value: Any) -> str | None:
    if (getattr(value, "__module__", None) or "").partition(".")[0] in ("torch", "secateur", "builtins"):
        return None  # the version says enough
    code = getattr(value, "__code__", None)
    # Two lambdas of one line have one source.
    own = repr((code.co_code, code.co_names, [c for c in code.co_consts if _is_plain(c)])) if code else ""
    try:
        return hashlib.sha256((inspect.getsource(value) + own).encode()).hexdigest()
    except (OSError, TypeError):  # made at a prompt, or not in Python
        return hashlib.sha256(own.encode()).hexdigest() if own else None


def _closure(value: Any) -> dict[str, Any]:
    value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
    names = getattr(getattr(value, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(value, "__closure__", None) or (), strict=False):
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        is_other = inspect.isfunction(content) and content is not value and not content.__closure__
        if _is_plain(content) or isinstance(content, Tensor) or is_other:
            found[name] = describe(content)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _defaults(value: Any) -> list[Any]:
    return list(getattr(value, "__defaults__", None) or ())


def _says_what_it_is(value: Any) -> bool:
    """Whether its text names settings, not an address in memory."""
    return " at 0x" not in repr(value)
