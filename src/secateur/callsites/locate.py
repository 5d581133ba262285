"""From a running frame to the `view`, `reshape` or attention call in the source."""

from __future__ import annotations

import ast
import dis
from itertools import islice
from types import CodeType, ModuleType

from secateur.callsites.attention import check_attention
from secateur.callsites.patch import made_here
from secateur.callsites.sites import ATTENTION, CallSite, Reason, called, take_apart, word
from secateur.callsites.sources import CallSiteError, Unit, features, loaded, module_of, same, units


def locate(code: CodeType, lasti: int, module: str | None = None) -> CallSite | Reason:
    """The `view`, `reshape` or attention call that a frame is in.

    Args:
        code: `f_code` of the frame, of code as it was imported or as `apply_edits` made it.
        lasti: `f_lasti` of the frame.
        module: `f_globals["__name__"]`; by default it is looked for.

    Returns:
        The call, or the reason why it cannot be repaired: no source, a source that is not what runs, sizes
        that are computed elsewhere (`x.view(shape)`, `x.view(*shape)`), a scale that is given, or another
        function.
    """
    if not hasattr(code, "co_positions"):
        return Reason("Python 3.10 does not keep the positions of calls: repairing them needs Python 3.11.")
    try:
        home = module_of(code) if module is None else loaded(module)
        found, tree = units(home, code.co_filename)
        call = _call_at(tree, code, lasti)
        unit = next((u for u in found if any(node is call for node in ast.walk(u.node))), None)
        if unit is None:
            raise CallSiteError(
                "It stands outside any function, and only functions can be replaced while a program runs."
            )
        if not _runs(unit, code):
            raise CallSiteError("The source is not what runs: it was changed after the import, or by a tool.")
        func, sizes = _understood(call, unit, home, code)
    except CallSiteError as error:
        return Reason(f"{code.co_filename}:{_line(code, lasti)}: {error}")
    line, column = word(func)
    return CallSite(
        unit.module,
        unit.qualname,
        unit.sha256,
        line - unit.first,
        column,
        called(func),
        sizes,
        f"{code.co_filename}:{line}",
    )


def _understood(
    call: ast.Call, unit: Unit, home: ModuleType, code: CodeType
) -> tuple[ast.Attribute | ast.Name, tuple[str, ...]]:
    """What is called, and its sizes as they are written; `CallSiteError` if it cannot be repaired."""
    func = call.func
    if isinstance(func, ast.Attribute | ast.Name) and called(func) == ATTENTION:
        if code.co_qualname != unit.qualname:
            raise CallSiteError(f"{ATTENTION} is called by a function inside {unit.qualname}.")
        check_attention(call, unit)
        return func, ()
    parts = take_apart(call, unit, home)
    return parts.func, tuple(ast.unparse(size) for size in parts.sizes)


def _line(code: CodeType, lasti: int) -> int:
    return next(
        (line for start, end, line in code.co_lines() if line and start <= lasti < end), code.co_firstlineno
    )


def _runs(unit: Unit, code: CodeType) -> bool:
    """Whether a code object is what the unit compiles to, as it stands or with edits."""
    if made_here(code):
        return True
    return any(same(code, c) for c in unit.compiled(unit.node, features(code)))


def _call_at(tree: ast.Module, code: CodeType, lasti: int) -> ast.Call:
    while lasti > 0 and dis.opname[code.co_code[lasti]] == "CACHE":
        lasti -= 2
    if not dis.opname[code.co_code[lasti]].startswith(("CALL", "PRECALL")):
        raise CallSiteError("The frame is not in a call.")
    position = next(islice(code.co_positions(), lasti // 2, None), (None,) * 4)
    if None in position:
        raise CallSiteError("It was compiled without columns: run Python without -X no_debug_ranges.")
    start, end, left, right = position
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or (node.end_lineno, node.end_col_offset) != (end, right):
            continue
        # In a chain over several lines a method call starts, for the compiler, at the name after the dot.
        starts = [(node.lineno, node.col_offset)]
        if isinstance(node.func, ast.Attribute):
            starts.append(word(node.func))
        if (start, left) in starts:
            return node
    raise CallSiteError("There is no call at this place of the source: it was changed after the import.")
