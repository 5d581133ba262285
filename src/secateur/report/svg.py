"""From what matplotlib writes to SVG that lives in a page: themed, small, and with ids of its own.

Works on the parsed tree and never on the text, so a label that reads like an attribute stays a label.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from secateur.report.theme import LIGHT

_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_VARIABLE = re.compile(r"var\(--([\w-]+)\)")
_ZOOM = re.compile(r"calc\((\S+?)\*var\(--zoom,1\)\)")
_NO_TURN = re.compile(r"^rotate\(-?0[ ,)]")
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
# What a browser does anyway, and the fonts, which follow the page.
_IMPLIED = {"font-family": None, "stroke-linejoin": None, "stroke-linecap": None, "text-anchor": "start"}
_SHAPES = {"path", "rect", "line", "circle", "ellipse", "polygon", "polyline", "use", "text", "tspan"}
_ALLOWED = _SHAPES | {"svg", "g", "defs", "clipPath", "title", "desc"}
_AWAY = re.compile(r"url\(\s*[^#\s]", re.IGNORECASE)


def tidy(raw: str) -> str:
    """Inline SVG from matplotlib's file: colours of the theme become CSS variables, ballast goes."""
    root = _parse(raw)
    _drop_ballast(root)
    used = _referenced(root)
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        _shorten(element)
    _unwrap(root)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib.update({"viewBox": f"0 0 {_round(width)} {_round(height)}"})
    root.set("style", f"--w:{_round(width)}px")
    return ET.tostring(root, encoding="unicode")


def embed(svg: str, prefix: str) -> str:
    """The same picture with every id, and every reference to one, behind `prefix`.

    Refuses what is not well-formed and what could run or fetch anything, with `ValueError`.
    """
    root = _parse(svg)
    if root.tag != "svg":
        raise ValueError(f"A figure's markup must be one <svg> element, not <{root.tag}>.")
    for element in root.iter():
        _check(element)
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name == "href":
                element.set(name, "#" + prefix + value[1:])
            else:
                element.set(name, _REFERENCE.sub(rf"url(#{prefix}\1)", value))
    return ET.tostring(root, encoding="unicode")


def extent(svg: str) -> tuple[float, float]:
    """Width and height of the picture, in CSS pixels at its natural size."""
    box = _parse(svg).get("viewBox", "").split()
    if len(box) != 4:
        raise ValueError("A figure's SVG must say its size in a viewBox.")
    return float(box[2]), float(box[3])


def _check(element: ET.Element) -> None:
    for name, value in element.attrib.items():
        away = not value.startswith("#") if name == "href" else _AWAY.search(value)
        if away or name.lower().startswith("on"):
            raise ValueError(f"A figure's SVG may not run or fetch anything; found {name}={value!r}.")
    if element.tag not in _ALLOWED:
        raise ValueError(f"A figure's SVG may hold only shapes and text; found <{element.tag}>.")


def standalone(panels: Sequence[str]) -> str:
    """One SVG file of all panels, in rows, with its colours written out for viewers without CSS."""
    gap, x, y, row, right, before = 12.0, 0.0, 0.0, 0.0, 0.0, 0.0
    limit = max(*(extent(panel)[0] for panel in panels), 800.0)
    placed = []
    for i, panel in enumerate(panels):
        width, height = extent(panel)
        if x and (x + width > limit or width != before):
            x, y, row = 0.0, y + row + gap, 0.0
        inner = _parse(embed(panel, f"p{i}-"))
        for element in inner.iter():
            if "style" in element.attrib:
                plain = _ZOOM.sub(r"\1", element.attrib["style"])
                element.set("style", _VARIABLE.sub(lambda m: LIGHT[m[1]], plain))
        inner.attrib.update({"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"})
        placed.append(ET.tostring(inner, encoding="unicode"))
        row, x, right, before = max(row, height), x + width + gap, max(right, x + width), width
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {y + row:g}" width="{right:g}" '
        f'height="{y + row:g}" font-family="sans-serif" stroke-linejoin="round">'
        f'<rect width="100%" height="100%" fill="{LIGHT["card"]}"/>'
    )
    return head + "".join(placed) + "</svg>\n"


def _parse(text: str) -> ET.Element:
    # Namespaces go: inline SVG in HTML needs none, and SVG 2 reads a plain href.
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"A figure's SVG is not well-formed XML: {error}.") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [n for n in element.attrib if n.startswith("{")]:
            element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)
    return root


def _drop_ballast(parent: ET.Element) -> None:
    for child in list(parent):
        # matplotlib's <style> would reach every element of the page.
        if child.tag in ("metadata", "style"):
            parent.remove(child)
        else:
            _drop_ballast(child)
            child.tail = None
            if child.tag in ("g", "defs"):
                child.text = None
                if not len(child):
                    parent.remove(child)
    if parent.tag != "text":
        parent.text = None


def _referenced(root: ET.Element) -> set[str]:
    found: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            found.update([value[1:]] if name == "href" else _REFERENCE.findall(value))
    return found


def _shorten(element: ET.Element) -> None:
    for name, value in list(element.attrib.items()):
        if name == "style":
            element.set(name, _style(value))
        elif name == "transform" and _NO_TURN.match(value):
            del element.attrib[name]
        elif name in ("d", "x", "y", "width", "height", "transform"):
            short = " ".join(_NUMBER.sub(lambda m: _round(m[0]), value).split())
            element.set(name, re.sub(r" ?([MLCQz]) ?", r"\1", short) if name == "d" else short)


def _style(text: str) -> str:
    kept = []
    for declaration in filter(None, (part.strip() for part in text.split(";"))):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in _IMPLIED and _IMPLIED[key] in (None, value):
            continue
        if key == "font-size":
            value = f"calc({value}*var(--zoom,1))"  # a narrow page draws the figure small, but not its text
        kept.append(f"{key}:{_VARIABLES.get(value.lower(), value)}")
    return ";".join(kept)


def _unwrap(parent: ET.Element) -> None:
    """Replace groups that say nothing by their children."""
    for child in list(parent):
        _unwrap(child)
    flat: list[ET.Element] = []
    for child in parent:
        flat.extend(child if child.tag == "g" and not child.attrib else [child])
    parent[:] = flat


def _round(text: str) -> str:
    short = f"{float(text):.2f}".rstrip("0").rstrip(".")
    return "0" if short == "-0" else short
