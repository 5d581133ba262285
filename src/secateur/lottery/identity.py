"""What decides a result, as text and as a digest: settings, functions by source, data by content."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from secateur.core.digest import bytes_of
from secateur.record import versions

LIBRARIES = ("torch", "secateur", "builtins")  # whose versions say enough


def describe(value: Any) -> Any:
    """Plain data that differs where results may.

    Dataclasses by their fields, tensors by a digest of their content, functions and classes by name, source,
    defaults, what they close over and what they read from their module or others of their package: numbers,
    texts, tuples, dictionaries and frozen dataclasses of them, tensors, and functions and classes in turn.
    What else they may read (files, lists, objects that change) is not seen, nor what they write themselves;
    give an experiment another name when that changes.
    """
    return _describe(value, set())


def _describe(value: Any, seen: set[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(bytes_of(value)).hexdigest()}"
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "of": _name(type(value)),
            **{f.name: _describe(getattr(value, f.name), seen) for f in fields(value)},
        }
    if isinstance(value, Mapping):
        return {str(k): _describe(v, seen) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [_describe(v, seen) for v in value]
    if isinstance(value, functools.partial):
        parts = {"of": value.func, "args": value.args, "with": value.keywords}
        return {name: _describe(part, seen) for name, part in parts.items()}
    if inspect.isroutine(value) or isinstance(value, type):
        if id(value) in seen:  # it stands in full where it was met first
            return _name(value)
        seen.add(id(value))
        known = {"of": _name(value), "source": _source(value), "defaults": _describe(_defaults(value), seen)}
        return known | {"closes over": _closure(value, seen), "reads": _reads(value, seen)}
    return {"of": _name(type(value)), "is": repr(value)} if _says_what_it_is(value) else _name(type(value))


def digest(data: Any) -> str:
    """SHA-256 of plain data and of the versions of secateur and torch."""
    deciding = {name: version for name, version in versions().items() if name in ("secateur", "torch")}
    text = json.dumps([data, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(value: Any) -> str:
    module, name = _module(value), getattr(value, "__qualname__", repr(value))
    return name if module == "__main__" else f"{module}.{name}"


def _module(value: Any) -> str:
    """Where a function or class is from; the same whether its module is imported or run with `python -m`."""
    module = getattr(value, "__module__", None) or ""
    if module == "__main__":
        spec = getattr(sys.modules.get(module), "__spec__", None)
        return module if spec is None else str(spec.name)
    return str(module)


def _source(value: Any) -> str | None:
    if _package(value) in LIBRARIES:
        return None
    # Two lambdas of one line have one source.
    own = "".join(_text(f.__code__) for f in _functions(value))
    try:
        return hashlib.sha256((inspect.getsource(value) + own).encode()).hexdigest()
    except (OSError, TypeError):  # made at a prompt, or not in Python
        return hashlib.sha256(own.encode()).hexdigest() if own else None


def _closure(value: Any, seen: set[int]) -> dict[str, Any]:
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
            found[name] = _describe(content, seen)
    return found


def _reads(value: Any, seen: set[int]) -> dict[str, Any]:
    """What a function, or the methods of a class, read from their module and from others of its package."""
    found: dict[str, Any] = {}
    package = _package(value)
    if package in LIBRARIES:
        return found
    if isinstance(value, type):
        own = [base for base in value.__mro__[1:] if _package(base) == package]
        found |= {f"base {_name(base)}": _describe(base, seen) for base in own}
    for function in _functions(value):
        names, attributes = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            content = function.__globals__[name]
            inside = {name: content}
            if inspect.ismodule(content) and content.__name__.partition(".")[0] == package:
                inside = {
                    f"{name}.{n}": getattr(content, n) for n in sorted(attributes) if hasattr(content, n)
                }
            for known, one in inside.items():
                theirs = inspect.isfunction(one) or isinstance(one, type)
                if _is_setting(one) or isinstance(one, Tensor) or (theirs and _package(one) == package):
                    found[known] = _describe(one, seen)
    return found


def _functions(value: Any) -> list[FunctionType]:
    """A function, or the methods of a class, as they were written."""
    found = vars(value).values() if isinstance(value, type) else [value]
    inner = [getattr(f, "__func__", getattr(f, "fget", f)) for f in found]  # of methods and properties
    unwrapped = [inspect.unwrap(f) for f in inner if callable(f)]
    return [f for f in unwrapped if isinstance(f, FunctionType)]


def _text(code: CodeType) -> str:
    inner = [_text(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return repr((code.co_code, code.co_names, [c for c in inner if _is_plain(c)]))


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Names that code, and code within it, reads from its module and never writes; names of attributes."""
    names, attributes, written = set(), set(), set()
    codes = [code]
    while codes:
        one = codes.pop()
        codes += [c for c in one.co_consts if isinstance(c, CodeType)]
        for instruction in dis.get_instructions(one):
            if instruction.opname == "LOAD_GLOBAL":
                names.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                attributes.add(instruction.argval)
            elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                written.add(instruction.argval)
    return names - written, attributes


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_setting(v) for v in value.values())
    if is_dataclass(value) and not isinstance(value, type):
        frozen = getattr(type(value), "__dataclass_params__").frozen  # noqa: B009
        return bool(frozen) and all(_is_setting(getattr(value, f.name)) for f in fields(value))
    return _is_plain(value)


def _package(value: Any) -> str:
    return _module(value).partition(".")[0]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _defaults(value: Any) -> list[Any]:
    return list(getattr(value, "__defaults__", None) or ())


def _says_what_it_is(value: Any) -> bool:
    """Whether its text names settings, not an address in memory."""
    return " at 0x" not in repr(value)
