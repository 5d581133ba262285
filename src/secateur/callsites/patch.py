"""Edits put into the functions of the running process, and taken back.

Which edits are in force is a fact about the process, like `sys.modules`: functions are shared by all models
that call them. It is kept here, in one table, so that edits of several models compose, and that taking back
those of one model leaves those of another in force.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import CodeType, FunctionType, ModuleType
from weakref import WeakKeyDictionary

import torch

from secateur.callsites.rewrite import is_helper, rewritten
from secateur.callsites.sites import Edit
from secateur.callsites.sources import (
    CallSiteError,
    Unit,
    attribute,
    features,
    functions,
    loaded,
    outermost,
    same,
    units,
)


@dataclass
class Applied:
    """Edits that `apply_edits` put in force.

    Attributes:
        edits: each once.
        changed: qualified names of the functions whose code was replaced; those that had it already are not
            among them.
    """

    edits: tuple[Edit, ...]
    changed: tuple[str, ...]
    _tables: tuple[tuple[_Table, list[Edit]], ...] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Take the edits back, but for those that another `apply_edits` asked for too.

        Functions without any edit left have their own code object again. A second call does nothing.
        """
        alive = functions(*(table.module for table, _ in self._tables))
        plans = [_plan(table, table.claims - Counter(edits), alive) for table, edits in self._tables]
        for plan in plans:
            plan.commit()
        self._tables = ()


def apply_edits(edits: Iterable[Edit]) -> Applied:
    """Replace sizes of calls in functions that exist, with all closures and decorated functions.

    Everything that calls these functions sees the edits, other models too. For a model whose sizes agree,
    -1 and the receiver's own size are what the argument was, so nothing changes for it, with one exception:
    of a tensor without elements -1 cannot be told.

    The functions keep their defaults, closures, annotations and line numbers. Code that reads their *source*
    does not see the edits: `torch.jit.script` compiles the source. Other processes do not see them either:
    there the edits have to be applied again.

    Edits that are in force already stay so, and are counted: see `Applied.undo`.

    Raises `CallSiteError`, with no function changed, if a module is not imported, if a function's source is
    not what it was when the edit was made, if the running code is not what the source compiles to, and if
    edits contradict each other.
    """
    wanted = tuple(dict.fromkeys(edits))
    if wanted and sys.version_info < (3, 11):
        raise CallSiteError("Calls cannot be repaired in Python 3.10, which does not keep their positions.")
    alive = functions(*(loaded(name) for name in {edit.module for edit in wanted}))
    groups = _grouped(wanted, alive)
    plans = [_plan(table, table.claims + Counter(new), alive) for table, new in groups]
    return Applied(wanted, tuple(name for plan in plans for name in plan.commit()), tuple(groups))


@dataclass
class _Table:
    """One unit with edits in force, or about to be.

    Attributes:
        flags: its features from `__future__`.
        codes: of the unit and the functions inside it, as its source compiles, parents first.
        claims: how often each edit was asked for.
        before: what functions had before their first edit.
        made: by id, codes with edits and their number in `codes`; None for a helper. They are kept, so that
            an id means one code.
    """

    unit: Unit
    module: ModuleType
    flags: int
    codes: Sequence[CodeType]
    claims: Counter[Edit] = field(default_factory=Counter)
    before: WeakKeyDictionary[FunctionType, CodeType] = field(default_factory=WeakKeyDictionary)
    made: dict[int, tuple[CodeType, int | None]] = field(default_factory=dict)

    def number(self, code: CodeType) -> int | None:
        """Which of `codes` a code is, or was made from; None if it is none of this unit's."""
        if id(code) in self.made:
            return self.made[id(code)][1]
        return next((i for i, known in enumerate(self.codes) if same(code, known)), None)

    def members(self, alive: Iterable[FunctionType]) -> list[tuple[FunctionType, int]]:
        """Functions of this unit that are alive, with their numbers."""
        named = attribute(self.module, self.unit.qualname)
        # After `gc.freeze()` the collector does not list what exists, but the module still has it.
        extra = [named] if type(named) is FunctionType else []
        found = {}
        for function in (*extra, *alive):
            if function.__globals__ is vars(self.module):
                number = self.number(function.__code__)
                if number is not None:
                    found[function] = number
        return list(found.items())


_TABLES: dict[tuple[str, str, str], _Table] = {}


def in_force(modules: Container[str]) -> tuple[Edit, ...]:
    """Edits in force in functions that these modules define.

    A model traced now runs with them, so a surgery on it needs them in other processes too.
    """
    return tuple(
        edit
        for table in _TABLES.values()
        for edit, n in table.claims.items()
        if n > 0 and edit.module in modules
    )


def made_here(code: CodeType) -> bool:
    """Whether a code object holds edits."""
    return any(id(code) in table.made for table in _TABLES.values())


@dataclass
class _Plan:
    table: _Table
    claims: Counter[Edit]
    codes: list[CodeType]
    helpers: list[CodeType]
    swaps: list[tuple[FunctionType, CodeType]]

    def commit(self) -> list[str]:
        """Do it; the names of the functions changed."""
        table = self.table
        for function, code in self.swaps:
            if id(function.__code__) not in table.made:
                table.before.setdefault(function, function.__code__)
            function.__code__ = code
        table.claims = self.claims
        numbers: list[int | None] = [*range(len(self.codes)), *(None for _ in self.helpers)]
        for code, number in zip((*self.codes, *self.helpers), numbers, strict=True):
            table.made[id(code)] = code, number
        key = table.unit.module, table.unit.qualname, table.unit.sha256
        if self.claims and sys.modules.get(table.unit.module) is table.module:
            _TABLES[key] = table
        elif _TABLES.get(key) is table:
            del _TABLES[key]
        return sorted({function.__qualname__ for function, _ in self.swaps})


def _plan(table: _Table, claims: Counter[Edit], alive: list[FunctionType]) -> _Plan:
    """What has to be done so that the edits of `claims` are in force; changes nothing."""
    codes, helpers = list(table.codes), list[CodeType]()
    if claims:
        made = table.unit.compiled(rewritten(table.unit, claims, table.module), table.flags)
        codes = [code for code in made if not is_helper(code)]
        helpers = [code for code in made if is_helper(code)]
        _check_alike(table, codes)
    swaps = []
    for function, number in table.members(alive):
        code = codes[number]
        if code == table.codes[number]:  # no edit in it: its own
            code = table.before.get(function, code)
        if code != function.__code__:
            swaps.append((function, code))
    return _Plan(table, claims, codes if claims else [], helpers, swaps)


def _check_alike(table: _Table, codes: list[CodeType]) -> None:
    """`CallSiteError` unless the new codes can take the place of the old ones."""

    def shape(code: CodeType) -> tuple[object, ...]:
        arguments = code.co_argcount + code.co_kwonlyargcount
        return (
            code.co_qualname,
            code.co_firstlineno,
            code.co_flags,
            code.co_freevars,
            code.co_varnames[:arguments],
        )

    if [shape(code) for code in codes] != [shape(code) for code in table.codes]:
        where = f"{table.unit.module}.{table.unit.qualname}"
        raise CallSiteError(f"{where} with its calls edited cannot take the place of the function.")


def _grouped(edits: Iterable[Edit], alive: list[FunctionType]) -> list[tuple[_Table, list[Edit]]]:
    """Edits by the unit they are in."""
    groups: dict[tuple[str, str, str], list[Edit]] = {}
    for edit in edits:
        groups.setdefault(edit.function, []).append(edit)
    return [(_table(key, alive), group) for key, group in groups.items()]


def _table(key: tuple[str, str, str], alive: list[FunctionType]) -> _Table:
    known = _TABLES.get(key)
    # A module can be imported anew, and then it has other functions.
    return known if known is not None and known.module is loaded(key[0]) else _resolve(*key, alive)


def _resolve(name: str, qualname: str, source: str, alive: list[FunctionType]) -> _Table:
    """The unit of these names and this source whose code runs; `CallSiteError` if there is none."""
    module = loaded(name)
    where = f"{name}.{qualname}"
    named = attribute(module, qualname)
    if isinstance(named, torch.jit.ScriptFunction):
        raise CallSiteError(f"{where} was compiled by TorchScript, which has no Python code to edit.")
    known = [f for f in (named, *alive) if type(f) is FunctionType and f.__globals__ is vars(module)]
    codes = [f.__code__ for f in known if outermost(f.__code__.co_qualname) == qualname]
    if not codes:
        raise CallSiteError(
            f"There is no function {where}: its calls were edited with another version of {name}."
        )

    # In a notebook cells that ran twice define functions twice: the one that has the name now comes first.
    files = dict.fromkeys(code.co_filename for code in codes)
    found = [unit for file in files for unit in units(module, file)[0] if unit.qualname == qualname]
    sound = [unit for unit in found if unit.sha256 == source]
    if not sound:
        raise CallSiteError(
            f"The source of {where} is not what it was when its calls were edited: use the same version of "
            f"{name.split('.')[0]}, or prune the model again."
        )
    for unit, flags in product(sound, dict.fromkeys(features(code) for code in codes)):
        table = _Table(unit, module, flags, unit.compiled(unit.node, flags))
        if any(table.number(code) is not None for code in codes):
            return table
    raise CallSiteError(
        f"{where} does not run as its source says: it was changed after the import, or by a tool."
    )
