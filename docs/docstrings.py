"""A griffe extension: the doctests of docstrings become code blocks, and their :math: roles formulas."""

import re
from typing import Any

import griffe

SESSION = re.compile(r"^( *)>>> .*\n?(?:^ *\S.*\n?)*", re.MULTILINE)  # up to the next blank line
ROLE = re.compile(r":math:`([^`]+)`")


def fenced(match: re.Match[str]) -> str:
    return f"{match[1]}```pycon\n{match[0].rstrip()}\n{match[1]}```\n"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"$\1$", SESSION.sub(fenced, obj.docstring.value))
