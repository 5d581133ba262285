"""The package's one direction of flow: imports go down only (read from syntax trees)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "secateur"

FLOORS = [
    "core",
    "stats criteria patterns schedules allocation solvers budget",
    "masks collect batchnorm measure operators record inspection progress printing graph surgery callsites "
    "swaps",
    "prune oneshot levels layerwise shrink shrunk dropped scoring selection reconstruct layers stream "
    "training lottery int8 lora fisher",
    "runtime artifacts checkpoint report pages shrink_page saved_report ticket_page integrations",
    "recipe recipe_schema cli demo ticket_demo testing __init__ __main__",
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
PLAIN_FLOORS = (0, 1)  # pure functions of tensors
PLAIN_IMPORTS = {*sys.stdlib_module_names, "torch", "jaxtyping", "secateur"}


def part(path: Path, package: Path) -> str:
    """The module or package directly under secateur that a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported(node: ast.AST, path: Path, package: Path) -> list[str]:
    """The absolute dotted names that one statement imports; none if it is no import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    here = ("secateur", *path.relative_to(package).parent.parts)
    base = [".".join(here[: len(here) - node.level + 1])] if node.level else []
    module = ".".join(base + ([node.module] if node.module else []))
    return [f"{module}.{alias.name}" for alias in node.names]


def target(name: str, package: Path) -> str:
    """The part of secateur that an absolute name lives in; a public name lives in ``__init__``."""
    head = name.split(".")[1] if "." in name else "__init__"
    is_module = (package / head).is_dir() or (package / f"{head}.py").is_file()
    return head if is_module else "__init__"


def upward(path: Path, package: Path) -> Iterator[str]:
    source = part(path, package)
    if source not in FLOOR_OF:
        yield f"{source} has no floor: enter it in the table of tests/test_floors.py"
        return
    floor = FLOOR_OF[source]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(node, path, package):
            top = name.split(".")[0]
            if floor in PLAIN_FLOORS and top not in PLAIN_IMPORTS:
                yield f"{source} (floor {floor}) imports {top}, which floors 0 and 1 do without"
            if top == "secateur" and FLOOR_OF.get(target(name, package), 0) > floor:
                yield f"{source} (floor {floor}) imports {name} from a floor above"


def hidden(path: Path, package: Path) -> Iterator[str]:
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                for name in imported(node, path, package):
                    if name.split(".")[0] == "secateur":
                        yield f"{part(path, package)} imports {name} inside a function"


def more_than_names(path: Path, package: Path) -> Iterator[str]:
    """What a re-exporting module holds besides a docstring, imports of the package, and dunder names."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = imported(node, path, package)
        is_import = bool(names) and all(n.split(".")[0] in ("secateur", "importlib") for n in names)
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_dunder = isinstance(node, ast.Assign) and all(
            isinstance(t, ast.Name) and t.id in ("__all__", "__version__") for t in node.targets
        )
        if not (is_import or is_docstring or is_dunder):
            yield f"{path.name}:{node.lineno} does more than re-export"


def faults(package: Path) -> list[str]:
    """Every breach of the rules in a tree of the package, each with its file."""
    found = [
        f"{path.relative_to(package)}: {fault}"
        for path in sorted(package.rglob("*.py"))
        for rule in (upward, hidden)
        for fault in rule(path, package)
    ]
    return list(dict.fromkeys(found)) + list(more_than_names(package / "__init__.py", package))


def test_the_package_keeps_to_its_floors():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("core/errors.py", "from secateur.stats import Gram", "secateur.stats.Gram from a floor above"),
        ("core/errors.py", "from ..stats import Gram", "secateur.stats.Gram from a floor above"),
        ("stats.py", "from . import masks", "secateur.masks from a floor above"),
        ("stats.py", "import secateur as sc", "secateur from a floor above"),
        ("stats.py", "from secateur import Gram", "secateur.Gram from a floor above"),
        ("stats.py", "if True:\n    import secateur.graph.trace", "secateur.graph.trace from a floor above"),
        ("stats.py", "import numpy as np", "imports numpy"),
        ("criteria/a.py", "def f():\n    import transformers", "imports transformers"),
        ("masks.py", "def f():\n    from secateur.core import topk", "inside a function"),
        ("graph/a.py", "class A:\n    def f(self):\n        from . import b", "inside a function"),
        ("novelty.py", "", "novelty has no floor"),
        ("__init__.py", "from secateur.stats import Gram\nx = 1", "__init__.py:2 does more than re-export"),
        ("__init__.py", "import torch", "__init__.py:1 does more than re-export"),
    ],
)
def test_a_breach_is_found(tmp_path, file, text, complaint):
    for name in ["__init__.py", "core/errors.py", "stats.py", "criteria/a.py", "masks.py", "graph/trace.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"""Sound."""\n')
    assert faults(tmp_path) == []

    (tmp_path / file).write_text(text)
    assert len(faults(tmp_path)) == 1
    assert complaint in faults(tmp_path)[0]


def test_what_the_rules_allow(tmp_path):
    for name, text in {
        "__init__.py": '"""Doc."""\nfrom importlib.metadata import version as _v\n'
        'from secateur.stats import Gram\n__all__ = ["Gram"]\n__version__ = _v("secateur")',
        "stats.py": "import math\nimport torch\nfrom jaxtyping import Float\nfrom secateur.core import topk",
        "core/topk.py": "from .errors import SecateurError",
        "core/errors.py": "",
        "masks.py": "import numpy\nfrom secateur import collect, stats",
        "collect.py": "def f():\n    import transformers",
        "cli/app.py": "import secateur as sc\nfrom .. import masks",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == []


def test_importing_secateur_loads_no_heavy_optional_package():
    heavy = ["transformers", "matplotlib", "sklearn"]
    program = f"import sys, secateur; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
