"""Steps of the documentation build: reference pages from the source tree, formulas as MathML.

MathML is drawn by the browser itself, so the site needs no script and no fonts for its formulas.
"""

import ast
import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "secateur"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NORM = "<mo>&#x02016;"  # a norm's bars, which browsers stretch when they carry an index, below the line


def parts() -> dict[str, str]:
    """The public modules and packages directly under secateur, each with the first line of its docstring."""
    paths = {path.stem: path for path in PACKAGE.glob("*.py")}
    paths |= {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    docs = {
        name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in sorted(paths.items())
    }
    return {name: (doc or "").partition("\n\n")[0] for name, doc in docs.items() if not name.startswith("_")}


def page_source(name: str) -> str:
    """Where a package lists its public names, its modules would show them a second time."""
    init = PACKAGE / name / "__init__.py"
    lists_names = init.is_file() and "__all__" in init.read_text("utf-8")
    return f"::: secateur.{name}\n    options:\n      show_submodules: {str(not lists_names).lower()}\n"


def on_config(config: MkDocsConfig) -> None:
    assert config.nav is not None
    pages = [{name: f"reference/{name}.md"} for name in parts()]
    config.nav.insert(-2, {"Reference": ["reference/index.md", *pages]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    rows = [f"| [`secateur.{name}`]({name}.md) | {' '.join(doc.split())} |" for name, doc in parts().items()]
    index = "\n".join(["# Reference", "", "| Part | What it is |", "| --- | --- |", *rows])
    files.append(File.generated(config, "reference/index.md", content=index))
    for name in parts():
        files.append(File.generated(config, f"reference/{name}.md", content=page_source(name)))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def mathml(match: re.Match[str]) -> str:
        tex = html.unescape(match[2]).strip()
        try:
            drawn = convert(tex, display="block" if match[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(
                f"{page.file.src_uri}: this formula cannot be drawn: {tex!r} ({error!r})"
            ) from error
        return drawn.replace(NORM, NORM.replace("<mo>", '<mo stretchy="false">'))

    return FORMULA.sub(mathml, content)
