"""Calls of attention that name no scale, and so take it from the size of a head."""

from __future__ import annotations

import ast

from secateur.callsites.sites import ATTENTION, Edit, called
from secateur.callsites.sources import CallSiteError, Unit


def check_attention(call: ast.Call, unit: Unit) -> str:
    """The name that the module has in a call's function; `CallSiteError` if a scale cannot be added to it."""
    func = call.func
    if not isinstance(func, ast.Attribute | ast.Name) or called(func) != ATTENTION:
        raise CallSiteError(f"{ast.unparse(func)} is not {ATTENTION}.")
    if any(keyword.arg in (None, "scale") for keyword in call.keywords):
        raise CallSiteError(f"{ATTENTION} is given a scale, or arguments by two stars.")
    arguments = unit.node.args
    first = [*arguments.posonlyargs, *arguments.args][:1]
    if not first:
        raise CallSiteError(f"{unit.qualname} has no module as its first argument.")
    for node in ast.walk(unit.node):
        if isinstance(node, ast.Name) and node.id == first[0].arg and not isinstance(node.ctx, ast.Load):
            raise CallSiteError(f"{unit.qualname} gives {node.id} another value.")
    return first[0].arg


def with_scale(call: ast.Call, unit: Unit, edit: Edit) -> ast.Call:
    """The call with the scale that the module keeps; None, the default, where it keeps none."""
    module = ast.Name(check_attention(call, unit), ast.Load())
    kept = ast.Call(
        ast.Name("getattr", ast.Load()), [module, ast.Constant(edit.kept_in), ast.Constant(None)], keywords=[]
    )
    keyword = ast.keyword("scale", kept)
    for node in ast.walk(keyword):
        if isinstance(node, ast.expr | ast.keyword):
            ast.copy_location(node, call)
    call.keywords.append(keyword)
    return call
