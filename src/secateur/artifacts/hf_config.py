"""Whether a configuration describes a Hugging Face model, and what it was before structured pruning."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifacts.hf_folder import import_transformers
from secateur.artifacts.sparse import Sparse
from secateur.artifacts.steps import Dropped, Step, later_name
from secateur.artifacts.tensors import first_line, listed, ties
from secateur.core.errors import ArtifactError, SurgeryError
from secateur.surgery.apply import owner_of

# Integers that shapes do not tell: 4 heads of 8 have the weights of 8 heads of 4.
_NUMBER = re.compile(r"head|group|scal")


@contextmanager
def same_config(config: Any) -> Iterator[None]:
    """Put back what `save_pretrained` writes into a configuration: dtype and architectures."""
    kept = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(kept)


def misfit(model: Any) -> str | None:
    """What the configuration gives otherwise than it is in the model: see `difference`. Costs no memory.

    None too for a class of the user's, whose constructor may need more than a configuration.
    """
    cls = type(model)
    if not is_theirs(cls):
        return None
    try:
        with torch.device("meta"):
            fresh = cls(copy.deepcopy(model.config))
    except Exception as error:  # sizes that do not divide one another, for instance
        return f"{cls.__name__} cannot be built from its configuration ({first_line(error).rstrip('.')})"
    return difference(model, fresh, "by its configuration")


def is_theirs(cls: type) -> bool:
    """Whether transformers itself has the class."""
    return getattr(import_transformers(), cls.__name__, None) is cls


def difference(model: nn.Module, fresh: nn.Module, whence: str) -> str | None:
    """The first difference of `fresh` from `model` in names, shapes, ties or numbers; None if there is none.

    Numbers are the settings of modules that shapes do not show: scales, and how many heads a width has.
    """
    ours, theirs = _shapes(model), _shapes(fresh)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            here, there = ours.get(name, "missing"), theirs.get(name, "missing")
            return f"{name} is {here} in the model but {there} {whence}"
    odd = {frozenset(group) for group in ties(model)} ^ {frozenset(group) for group in ties(fresh)}
    if odd:
        return f"{listed(min(odd, key=sorted))} are tied in the model or {whence} but not both"
    mine, built = _numbers(model), _numbers(fresh)
    for name in mine.keys() & built.keys():
        if mine[name] != built[name]:
            return f"{name} is {mine[name]} in the model but {built[name]} {whence}"
    return None


@contextmanager
def dense_config(model: Any, steps: Sequence[Step]) -> Iterator[None]:
    """While this holds, the configurations in `model` say what they said before `steps`.

    Raises `ArtifactError` if one says neither what it said before nor after.
    """
    back: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for i in reversed(range(len(steps))):
            for values, name, index, old, new in _fields(model, steps[i], steps[i + 1 :]):
                found: Any = values.get(name)
                now = found if index is None else found[index] if _has(found, index) else None
                if _plain(now) not in (_plain(old), _plain(new)):
                    raise ArtifactError(
                        f"{name} of the configuration is {now!r}, and not {new!r} as after the surgery."
                    )
                back.append((values, name, found))
                values[name] = _with(found, index, old)
        yield
    finally:
        for values, name, found in reversed(back):
            values[name] = found


Field = tuple[dict[str, Any], str, int | None, Any, Any]  # of what, which, entry, before, after


def _fields(model: nn.Module, step: Step, later: Sequence[Step]) -> Iterator[Field]:
    """Fields of configurations that a step changed, the last first."""
    if isinstance(step, Dropped):
        for edit in reversed(step.changes.edits):
            holder: Any = _module(model, edit.module, (step, *later))
            for name in edit.path[:-1]:
                holder = getattr(holder, name, None)
            if _is_config(holder):
                yield vars(holder), edit.path[-1], None, edit.old, edit.new
        return
    if isinstance(step, Sparse):
        return
    for attribute in reversed(step.attributes):
        module = _later(attribute.module, later)
        if module is None or not attribute.steps:
            continue
        try:
            owner = owner_of(model, replace(attribute, module=module))
        except SurgeryError as error:
            raise ArtifactError(f"The surgery is for another model: {error}") from None
        if _is_config(owner):
            yield vars(owner), attribute.name, attribute.index, attribute.old, attribute.new


def _module(model: nn.Module, name: str, later: Iterable[Step]) -> nn.Module | None:
    now = _later(name, later)
    try:
        return None if now is None else model.get_submodule(now)
    except AttributeError:
        return None


def _later(name: str, steps: Iterable[Step]) -> str | None:
    now: str | None = name
    for step in steps:
        now = later_name(now, step) if now else now
    return now


def _is_config(thing: Any) -> bool:
    return any(c.__name__ in ("PretrainedConfig", "PreTrainedConfig") for c in type(thing).__mro__)


def _has(found: Any, index: int) -> bool:
    return isinstance(found, tuple | list) and index < len(found)


def _with(found: Any, index: int | None, old: Any) -> Any:
    if index is not None:
        return type(found)([*found[:index], old, *found[index + 1 :]])
    return tuple(old) if isinstance(found, tuple) else copy.deepcopy(old)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Of the state dict, and of buffers that are not saved."""
    tensors: dict[str, Tensor] = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _numbers(model: nn.Module) -> Mapping[str, float]:
    found = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            # Rates of dropout act in training only, and are changed freely.
            of_code = type(value) is int and _NUMBER.search(name)
            if of_code or (type(value) is float and "drop" not in name):
                found[f"{prefix}.{name}" if prefix else name] = value
    return found
