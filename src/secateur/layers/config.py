"""Which fields of a configuration count the blocks: found by value, proven by building a model."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn

from secateur.layers.changes import Cut, Edit, Journal

Path = tuple[str, ...]
Write = tuple[Path, Any, Any]  # a path from the configuration, its old value and the new one

_LIKELY = re.compile(r".*(layer|depth|block).*")
_PER_LAYER = re.compile(r".*(layer|depth|block|pattern|schedule|type).*")
_USUAL = re.compile(r"(num_)?(hidden_|n_)?(layers?|blocks?|depths?)")
_BUILDS = 24  # at most so many candidates are tried


@dataclass(frozen=True)
class Traits:
    """What a model is, apart from the values of its tensors.

    Attributes:
        tensors: shape of each entry of the state dict.
        settings: class of each module, and the numbers, flags and strings that it holds.
    """

    tensors: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Traits:
        """Read a model, which may be on the meta device."""
        settings: dict[str, Any] = {}
        for name, module in model.named_modules():
            settings[f"{name}."] = type(module).__qualname__
            for key, value in vars(module).items():
                if _is_setting(key, value):
                    settings[f"{name}.{key}"] = value
        return cls({n: tuple(t.shape) for n, t in model.state_dict().items()}, settings)

    def unlike(self, built: Traits) -> tuple[list[str], list[str]]:
        """Names of tensors and of settings in which a model that was built differs."""
        return _unequal(self.tensors, built.tensors), _unequal(self.settings, built.settings)


@dataclass(frozen=True)
class Dialect:
    """How a model differs from one built from its own configuration before anything is dropped.

    Attributes:
        tensors: names of tensors that differ, such as those of a head that it was built without.
        settings: names of attributes that differ.
        failure: why no model can be built; None if one can.
    """

    tensors: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    failure: str | None = None

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> Dialect:
        """Build one and compare."""
        built = build(model, config, ())
        if isinstance(built, str):
            return cls(failure=built)
        tensors, settings = Traits.of(model).unlike(built)
        return cls(frozenset(tensors), frozenset(s.rpartition(".")[2] for s in settings))

    def unlike(self, ours: Traits, built: Traits) -> tuple[list[str], list[str]]:
        """Names of tensors and of settings in which a model differs otherwise than it did."""
        tensors, settings = ours.unlike(built)
        return (
            [name for name in tensors if name not in self.tensors],
            [name for name in settings if name.rpartition(".")[2] not in self.settings],
        )


def fit(model: nn.Module, config: Any, cut: Cut, known: Dialect) -> tuple[Write, ...]:
    """Find the fields of `config` to write, for a model from which blocks have been taken.

    A field is an integer, or an element of a list, that is the old length of the list of blocks. It is right
    if a model built on the meta device from the changed configuration has exactly the tensors of `model`,
    after the configuration went through its own `to_dict` and `from_dict`. Lists of the old length lose the
    entries of the dropped blocks, unless the result fits better without. Of several that are right, the one
    whose modules hold most settings in common with the model's is taken. If none is, a count of the usual
    name is written all the same, since the model may read it at run time.

    Args:
        model: the module that the configuration belongs to, after the cut.
        config: its configuration, before.
        cut: what was taken.
        known: how the model differed before.
    """
    ours = Traits.of(model)
    best: tuple[int, tuple[Write, ...]] | None = None
    for writes in _candidates(config, cut) if known.failure is None else ():
        built = build(model, config, writes)
        if isinstance(built, str):
            continue
        tensors, settings = known.unlike(ours, built)
        if not tensors and (best is None or len(settings) < best[0]):
            best = len(settings), writes
        if best is not None and best[0] == 0:
            break
    if best is not None:
        return best[1]
    usual = (w for w in _candidates(config, cut) if w and _USUAL.fullmatch(w[0][0][-1]))
    return next((w for w in usual if isinstance(w[0][1], int)), ())


def disagreement(model: nn.Module, config: Any, known: Dialect, lists: Collection[nn.Module]) -> str | None:
    """What a model built from the configuration has otherwise, and had not before; None if nothing.

    Outside of the `lists` that were cut, a setting that it lacks does not count: it is what is left of a kind
    of block of which none stayed.
    """
    built = known.failure or build(model, config, ())
    if isinstance(built, str):
        return built
    ours = Traits.of(model)
    tensors, settings = known.unlike(ours, built)
    cut = tuple(f"{name}." for name, module in model.named_modules() if module in lists)
    settings = [s for s in settings if s in built.settings or s.startswith(cut)]
    if not tensors and not settings:
        return None
    name = [*tensors, *settings][0]
    a, b = ({**side.tensors, **side.settings}.get(name, "missing") for side in (ours, built))
    return f"{name.strip('.') or 'the model'} is {a} in the model, but {b} by its configuration"


def settled(journal: Journal, name: str, config: Any, known: Dialect) -> Iterator[Edit]:
    """Edits that give modules the settings that a model built from the configuration has."""
    model = journal.module(name)
    built = known.failure or build(model, config, ())
    if isinstance(built, str):
        return
    ours = Traits.of(model)
    tensors, settings = known.unlike(ours, built)
    here = {id(module): other for other, module in journal.items()}
    for setting in settings if not tensors else ():
        inner, _, attribute = setting.rpartition(".")
        if attribute and setting in ours.settings and setting in built.settings:
            other = here[id(model.get_submodule(inner))]
            yield Edit(other, (attribute,), ours.settings[setting], built.settings[setting])


def build(model: nn.Module, config: Any, writes: Sequence[Write]) -> Traits | str:
    """A model of the same class from a changed configuration, without weights; or why that fails."""
    try:
        with _quiet(), torch.device("meta"), torch.random.fork_rng([]):
            changed = copy.deepcopy(config)
            for path, _, new in writes:
                holder = changed
                for step in path[:-1]:
                    holder = getattr(holder, step)
                vars(holder)[path[-1]] = copy.deepcopy(new)
            if hasattr(changed, "to_dict") and hasattr(type(changed), "from_dict"):
                changed = type(changed).from_dict(changed.to_dict())
            return Traits.of(type(model)(changed))
    except Exception as error:  # constructors fail in as many ways as there are models
        text = str(error).strip().partition("\n")[0]
        return f"{type(model).__name__}(config) fails: {type(error).__name__}: {text}"


def configs(journal: Journal, around: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Distinct configurations of the modules around a stack, outermost first."""
    seen = set()
    for name in around:
        config = getattr(journal.module(name), "config", None)
        if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield name, config


def as_edits(journal: Journal, name: str, writes: Sequence[Write]) -> Iterator[Edit]:
    """The writes as edits of the module that holds the configuration, and of all with copies of its lists."""
    for path, old, new in writes:
        yield Edit(name, ("config", *path), old, new)
        if isinstance(new, list) and len(new) < len(old):
            for other, module in journal.items():
                copied = vars(module).get(path[-1])
                if isinstance(copied, tuple | list) and [*copied] == old:
                    yield Edit(other, (path[-1],), old, new)


def _fields(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Fields of a configuration and of those within it."""
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") or (is_dataclass(value) and not isinstance(value, type)):
            yield from _fields(value, (*path, key))
        else:
            yield (*path, key), value


def _candidates(config: Any, cut: Cut) -> Iterator[tuple[Write, ...]]:
    """Sets of writes to try: nothing, then each count with the lists beside it, likely names first."""
    yield ()
    fields = [*_fields(config)]
    counts: list[Write] = []
    for path, value in fields:
        if type(value) is int and value == cut.length:
            counts.append((path, value, len(cut.kept)))
        elif isinstance(value, tuple | list) and all(type(v) is int for v in value):
            for i, v in enumerate(value):
                if v == cut.length:
                    counts.append((path, [*value], [*value[:i], len(cut.kept), *value[i + 1 :]]))
    counts.sort(key=lambda w: (_LIKELY.fullmatch(w[0][-1]) is None, len(w[0])))
    tried = 1
    for write in counts:
        beside = [
            (path, [*value], [value[i] for i in cut.kept])
            for path, value in fields
            if path[:-1] == write[0][:-1] and path != write[0]
            if isinstance(value, tuple | list) and len(value) == cut.length
        ]
        likely = [w for w in beside if _PER_LAYER.fullmatch(w[0][-1])]
        for lists in [likely, *([beside] if beside != likely else []), *([[]] if likely else [])]:
            if tried < _BUILDS:
                tried += 1
                yield (write, *lists)


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    missing = object()
    names = [*ours, *(n for n in theirs if n not in ours)]
    return [n for n in names if ours.get(n, missing) != theirs.get(n, missing)]


def _is_setting(key: str, value: Any) -> bool:
    # Rates of dropout and of dropped paths follow the depth, but act in training only.
    if key == "training" or key.startswith("_") or "drop" in key:
        return False
    if isinstance(value, tuple | list):
        return all(_is_setting("", v) for v in value)
    return value is None or isinstance(value, int | float | bool | str)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and messages of configurations that are only tried."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
