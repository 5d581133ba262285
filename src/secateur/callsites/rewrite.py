"""Edits of calls in the syntax tree of a function.

Attention gets one more argument. For sizes, -1 simply takes the argument's place. A size of the receiver
needs the receiver twice, and it must be evaluated once: `f(x).reshape(B, N, C)` becomes

    (lambda r, s0, s1, s2: r.reshape(s0, r.shape[1], s2))(f(x), B, None, C)

A lambda and no assignment expression, since that is not allowed everywhere, would keep the receiver alive
until the function ends, and inside a comprehension would become a variable of the function around it. All
arguments but the replaced one are evaluated as before and in their order, where they stood.

The replaced argument stays in the tree as `-1 if True else N`, which compiles to -1 alone. For the symbol
table its names are still used, so the code keeps its free variables (`super()` is one) and can take the
place of the code of a closure that exists already.
"""

from __future__ import annotations

import ast
import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import CodeType, ModuleType

from secateur.callsites.attention import with_scale
from secateur.callsites.sites import ATTENTION, Edit, Parts, take_apart, word
from secateur.callsites.sources import CallSiteError, Function, Unit

_RECEIVER = "_secateur_receiver"
_OBSERVABLE = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def rewritten(unit: Unit, edits: Iterable[Edit], module: ModuleType) -> Function:
    """A copy of the unit's tree with some sizes replaced; `CallSiteError` if an edit does not fit."""
    wanted: dict[tuple[int, int], list[Edit]] = defaultdict(list)
    for edit in edits:
        wanted[edit.line + unit.first, edit.column].append(edit)
    editor = _Editor(unit, module, wanted)
    node: Function = editor.visit(copy.deepcopy(unit.node))
    if wanted:
        left = next(iter(wanted.values()))[0]
        raise CallSiteError(f"{left}: there is no such call in the function.")
    return node


def is_helper(code: CodeType) -> bool:
    """Whether a code object is a lambda that stands here and not in the source."""
    return code.co_varnames[:1] == (_RECEIVER,)


class _Editor(ast.NodeTransformer):
    def __init__(self, unit: Unit, module: ModuleType, wanted: dict[tuple[int, int], list[Edit]]) -> None:
        self.unit, self.module, self.wanted = unit, module, wanted

    def visit_Call(self, node: ast.Call) -> ast.AST:
        place = word(node.func) if isinstance(node.func, ast.Attribute | ast.Name) else (0, 0)
        edits = self.wanted.pop(place, None)
        if edits is None:
            return self.generic_visit(node)
        if edits[0].method == ATTENTION:
            self.generic_visit(node)
            return with_scale(node, self.unit, edits[0])
        parts = take_apart(node, self.unit, self.module)
        dimensions = _dimensions(edits, parts)
        self.generic_visit(node)  # after it was taken apart: the receiver may hold another call to edit
        parts = take_apart(node, self.unit, self.module)
        if any(dimension is not None for dimension in dimensions.values()):
            return _through_lambda(node, parts, dimensions)
        for argument in dimensions:
            parts.sizes[argument] = _instead(_minus_one(), parts.sizes[argument])
        return _with_sizes(node, parts)


def _dimensions(edits: list[Edit], parts: Parts) -> dict[int, int | None]:
    """The new sizes by argument; `CallSiteError` if they contradict each other or the call."""
    found: dict[int, int | None] = {}
    for edit in edits:
        if edit.method != parts.func.attr or edit.argument >= len(parts.sizes):
            raise CallSiteError(f"{edit}: the call there is {parts.func.attr} with {len(parts.sizes)} sizes.")
        if found.setdefault(edit.argument, edit.dimension) != edit.dimension:
            raise CallSiteError(f"{edit}: another edit that is in force takes it from elsewhere.")
        old = parts.sizes[edit.argument]
        if any(isinstance(inner, _OBSERVABLE + _SCOPES) for inner in ast.walk(old)):
            raise CallSiteError(
                f"{edit}: {ast.unparse(old)} does more than give a size, so it cannot be left out."
            )
    inferred = [
        found[i] is None if i in found else ast.unparse(size) == "-1" for i, size in enumerate(parts.sizes)
    ]
    if sum(inferred) > 1:
        raise CallSiteError(
            f"{edits[0]}: with it {sum(inferred)} sizes of one call would be -1, and only one can."
        )
    return found


def _instead(new: ast.expr, old: ast.expr) -> ast.expr:
    return _at(ast.IfExp(ast.Constant(True), new, old), old)


def _minus_one() -> ast.expr:
    return ast.UnaryOp(ast.USub(), ast.Constant(1))


def _at(new: ast.expr, old: ast.expr) -> ast.expr:
    """A new node at the place of an old one, for tracebacks and for `locate`."""
    for node in ast.walk(new):
        if node is not old and isinstance(node, ast.expr) and not hasattr(node, "lineno"):
            ast.copy_location(node, old)
    return new


def _with_sizes(call: ast.Call, parts: Parts) -> ast.Call:
    """The call with `parts.sizes`, which it may not hold itself: they can be arguments or in a holder."""
    if parts.holder is None:
        call.args = parts.sizes
    else:
        parts.holder.elts = parts.sizes
    return call


def _through_lambda(call: ast.Call, parts: Parts, dimensions: Mapping[int, int | None]) -> ast.expr:
    names = [_RECEIVER, *(f"_secateur_size_{i}" for i in range(len(parts.sizes)))]
    inner: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names[1:]]
    outer = [parts.receiver, *parts.sizes]
    receiver = ast.Name(_RECEIVER, ast.Load())
    for argument, dimension in dimensions.items():
        shape = ast.Attribute(copy.copy(receiver), "shape", ast.Load())
        size = (
            _minus_one() if dimension is None else ast.Subscript(shape, ast.Constant(dimension), ast.Load())
        )
        inner[argument] = size
        outer[argument + 1] = _instead(ast.Constant(None), parts.sizes[argument])
    # `torch.reshape` means the same as the method, whatever `torch` is called in the module.
    method = ast.copy_location(ast.Attribute(receiver, parts.func.attr, ast.Load()), parts.func)
    body = ast.copy_location(ast.Call(method, [ast.Tuple(inner, ast.Load())], []), call)
    arguments = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    new = ast.copy_location(ast.Call(ast.Lambda(arguments, body), outer, []), call)
    return ast.fix_missing_locations(new)
