"""Functions in source files, and whether a code object is what its source compiles to."""

from __future__ import annotations
import __future__ as future

import ast
import functools
import gc
import hashlib
import inspect
import linecache
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

from secateur.core.errors import SecateurError

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

_FUTURE = 0
for _name in future.all_feature_names:
    _FUTURE |= getattr(future, _name).compiler_flag


class CallSiteError(SecateurError):
    """A call that cannot be repaired, or an edit that does not fit the source that runs."""


@dataclass(frozen=True)
class Unit:
    """An outermost function of a module; functions and lambdas inside it belong to it.

    Attributes:
        qualname: as `__qualname__`: "Attention.forward"; "<lambda>" for a lambda outside any function.
        node: its definition, never changed.
        classes: the classes around it, from the outside.
        imports: the import statements of the module, outside functions and classes.
        text: its lines, with those of its decorators.
    """

    module: str
    filename: str
    qualname: str
    node: Function = field(repr=False)
    classes: tuple[ast.ClassDef, ...] = field(repr=False)
    imports: tuple[ast.stmt, ...] = field(repr=False)
    text: str = field(repr=False)

    @property
    def first(self) -> int:
        """Line at which it starts, as `co_firstlineno` counts it: that of its first decorator."""
        return _first(self.node)

    @property
    def sha256(self) -> str:
        """Of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def compiled(self, node: Function, flags: int) -> list[CodeType]:
        """Codes of `node` and of the functions inside it, parents first.

        Its classes are compiled around it, without their other content: they decide about `super()`,
        private names and `__qualname__`. The imports decide how names of modules are looked up. `flags` are
        the `features` of the running code.
        """
        body: list[ast.stmt] = [ast.Expr(node) if isinstance(node, ast.Lambda) else node]
        for outer in reversed(self.classes):
            kept = {"type_params": outer.type_params} if hasattr(outer, "type_params") else {}
            shell = ast.ClassDef(outer.name, bases=[], keywords=[], body=body, decorator_list=[], **kept)
            body = [ast.copy_location(shell, outer)]
        tree = ast.fix_missing_locations(ast.Module([*self.imports, *body], type_ignores=[]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the user's source, which Python gave when it was imported
            code = compile(tree, self.filename, "exec", flags=flags, dont_inherit=True)
        for found in walk(code):
            if found.co_qualname == self.qualname and found.co_firstlineno == self.first:
                return list(walk(found))
        raise CallSiteError(f"{self.qualname} in {self.filename} does not compile to a function of its name.")


def _first(node: Function) -> int:
    decorators = getattr(node, "decorator_list", [])
    return int(decorators[0].lineno if decorators else node.lineno)


def walk(code: CodeType) -> Iterator[CodeType]:
    """A code object and those inside it, parents first."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from walk(constant)


def features(code: CodeType) -> int:
    """The features from `__future__` that a code object was compiled with, as `compile` takes them."""
    return code.co_flags & _FUTURE


def same(a: CodeType, b: CodeType) -> bool:
    """Whether two codes come from the same place of equal sources."""
    # Equality of codes leaves out the file name, and in the first Python 3.11 the columns.
    if a.co_filename != b.co_filename or a != b:
        return False
    return list(a.co_positions()) == list(b.co_positions())


def outermost(qualname: str) -> str:
    """The unit that a function of this `__qualname__` belongs to."""
    return qualname.split(".<locals>")[0]


def units(module: ModuleType, filename: str) -> tuple[list[Unit], ast.Module]:
    """All units of a file, and its tree; `CallSiteError` if there is no source that can be parsed."""
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, vars(module))
    if not lines:
        raise CallSiteError(f"{filename} has no source to be read: only Python source can be repaired.")
    return _parsed(module.__name__, filename, tuple(lines))


@functools.lru_cache(maxsize=4)  # a trace locates many calls of one file, and large files take a while
def _parsed(module: str, filename: str, lines: tuple[str, ...]) -> tuple[list[Unit], ast.Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise CallSiteError(f"{filename} cannot be parsed: {error}.") from None

    imports: list[ast.stmt] = []
    outer: list[tuple[Function, tuple[ast.ClassDef, ...]]] = []

    def visit(node: ast.AST, classes: tuple[ast.ClassDef, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                outer.append((child, classes))
            elif isinstance(child, ast.Import | ast.ImportFrom):
                # Those of classes are other names; those from __future__ are in the flags of the code.
                if not classes and getattr(child, "module", None) != "__future__":
                    imports.append(child)
            else:
                visit(child, (*classes, child) if isinstance(child, ast.ClassDef) else classes)

    visit(tree, ())
    found = []
    for node, classes in outer:
        name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
        qualname = ".".join([*(c.name for c in classes), name])
        text = "".join(lines[_first(node) - 1 : node.end_lineno])
        found.append(Unit(module, filename, qualname, node, classes, tuple(imports), text))
    return found, tree


def loaded(name: str) -> ModuleType:
    """An imported module; `CallSiteError` if it is not: names from a file are never imported."""
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        raise CallSiteError(
            f"The module {name} is not imported, and Secateur does not do it: import it first."
        )
    return module


def module_of(code: CodeType) -> ModuleType:
    """The imported module that a code object belongs to."""
    for module in list(sys.modules.values()):
        # Not `module.__file__`: asking a lazy module for an attribute may import what it stands for.
        if isinstance(module, ModuleType) and vars(module).get("__file__") == code.co_filename:
            return module
    main = sys.modules["__main__"]  # in a notebook every cell is a file of its own
    if any(function.__code__.co_filename == code.co_filename for function in functions(main)):
        return main
    raise CallSiteError(f"No imported module comes from {code.co_filename}.")


def functions(*modules: ModuleType) -> list[FunctionType]:
    """All Python functions of some modules that are alive, decorated ones and closures too."""
    found = gc.get_referrers(*(vars(module) for module in modules))
    namespaces = {id(vars(module)) for module in modules}
    return [x for x in found if type(x) is FunctionType and id(x.__globals__) in namespaces]


def attribute(module: ModuleType, qualname: str) -> Any:
    """What a module has under a qualified name, found without running any code; None if nothing."""
    found: Any = module
    for part in qualname.split("."):
        found = inspect.getattr_static(found, part, None)
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found
