"""The page keeps its promises: one file, small, offline, escaped, deterministic, readable in both modes."""

import ast
import hashlib
import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur.report
from secateur.report import Figure, Section, Table, compact, number, percent, render, size, write
from secateur.report.numbers import column
from secateur.report.theme import DARK, LIGHT, SERIES
from tests.report.conftest import HOSTILE, build_page

SQUARE = '<svg viewBox="0 0 10 10"><defs><path id="a" d="M0 0L1 1"/></defs><use href="#a"/></svg>'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Elements with their attributes in order, the text of each, and whether the tags nest."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def texts_in(self, tag):
        return [text for inside, text in self.texts if inside == tag]


def one_table(*rows, columns=("layer", "value")):
    return render("t", "", [], [Section("s", tables=[Table(columns, rows)])])


def test_a_page_of_300_layers_12_curves_and_40_histograms_is_below_one_megabyte():
    html = build_page(layers=300, criteria=12, panels=40, bins=60, points=np.linspace(0, 0.99, 30))
    assert len(html.encode()) < 1_000_000
    assert html.count("<tr>") > 300


def test_nothing_is_fetched_and_nothing_runs(page):
    assert "http://" not in page and "https://" not in page and "@import" not in page and "//" not in page
    reader = Reader(page)
    assert not {tag for tag, _ in reader.elements} & {"script", "img", "iframe", "object", "image"}
    for tag, attributes in reader.elements:
        assert not any(name.startswith("on") or name == "src" for name in attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert set(re.findall(r"url\((.)", re.sub(r"url\(#a\)", "", page))) <= {"#"}
    policy = next(
        a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_hostile_names_stay_text_everywhere(page):
    reader = Reader(page)
    assert HOSTILE in "".join(reader.texts_in("li"))
    assert HOSTILE in reader.texts_in("dd")
    assert any(HOSTILE in text for text in reader.texts_in("h1"))
    # Long names are cut in the middle in figures: both ends are still there, as text of the SVG.
    assert any(t.startswith("</text><sc") and t.endswith("url(#a)") for t in reader.texts_in("text"))
    assert any(HOSTILE in attributes.get("aria-label", "") for _, attributes in reader.elements)
    assert "alert" not in "".join(reader.texts_in("script"))


def test_the_same_input_gives_the_same_bytes_in_another_process_too(page):
    code = (
        "import hashlib; from tests.report.conftest import build_page;"
        "print(hashlib.sha256(build_page(20, 6, 12).encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == hashlib.sha256(page.encode()).hexdigest()


def test_ids_are_unique_and_every_reference_resolves_even_for_the_same_figure_twice():
    figures = [
        Figure(SQUARE, "one", "one"),
        Figure(SQUARE, "two", "two"),
        Figure((SQUARE, SQUARE), "three", ""),
    ]
    sections = [
        Section("a", figures=figures),
        Section("b", figures=figures, tables=[Table(["x"], [["y"]], "c")]),
    ]
    reader = Reader(render("t", "", [], sections))
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids)) and len([i for i in ids if i.endswith("-a")]) == 8
    uses = [a["href"][1:] for tag, a in reader.elements if tag == "use"]
    assert len(uses) == len(set(uses)) == 8 and set(uses) <= set(ids)
    assert {a["aria-labelledby"] for _, a in reader.elements if "aria-labelledby" in a} <= set(ids)


def test_ids_of_drawn_figures_are_unique_and_referenced(page):
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = {a["href"][1:] for tag, a in reader.elements if tag == "use"}
    used |= {m for _, a in reader.elements for m in re.findall(r"url\(#([^)]+)\)", a.get("clip-path") or "")}
    assert used and used <= set(ids)


def test_every_figure_has_its_caption_and_a_description(page):
    reader = Reader(page)
    captions = " ".join(reader.texts_in("figcaption"))
    for caption in ("after fine-tuning", "of each layer", "one layer is pruned", "Bytes before and after"):
        assert caption in captions
    drawings = [a for _, a in reader.elements if a.get("role") == "img"]
    assert len(drawings) == 5 and all(len(a["aria-label"]) > 20 for a in drawings)


def test_tables_are_tables_with_row_and_column_headers_and_numbers_to_the_right():
    html = one_table(
        ["a", 1234567, 0.5, "x"], ["b", None, 0.25, "y"], columns=("layer", "n", "share", "word")
    )
    reader = Reader(html)
    assert reader.texts_in("td") == ["1,234,567", "0.50", "x", "–", "0.25", "y"]
    assert [a.get("scope") for tag, a in reader.elements if tag == "th"] == ["col"] * 4 + ["row"] * 2
    words = [a.get("class") for tag, a in reader.elements if tag == "td"]
    assert words == [None, None, "words"] * 2


def test_a_page_of_text_only_needs_nothing_else():
    reader = Reader(render("Title", "", [], []))
    assert reader.texts_in("h1") == ["Title"]
    assert not {"dl", "nav", "section", "footer"} & {tag for tag, _ in reader.elements}


@pytest.mark.parametrize(
    "svg, reason",
    [
        ("<svg viewBox='0 0 1 1'><script>1</script></svg>", "<script>"),
        ("<svg viewBox='0 0 1 1'><foreignObject/></svg>", "<foreignObject>"),
        ("<svg viewBox='0 0 1 1'><g onclick='x()'/></svg>", "onclick"),
        ("<svg viewBox='0 0 1 1'><use href='//elsewhere/x.svg#a'/></svg>", "href"),
        ("<svg viewBox='0 0 1 1'><path style='fill: URL( //elsewhere/x)'/></svg>", "style"),
        ("<svg viewBox='0 0 1 1'><g>", "not well-formed"),
        ("<svg/>", "viewBox"),
        ("<div viewBox='0 0 1 1'/>", "<div>"),
    ],
)
def test_markup_that_could_run_or_fetch_is_refused(svg, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        render("t", "", [], [Section("s", figures=[Figure(svg, "", "")])])


def test_rows_that_do_not_fit_their_columns_are_refused():
    with pytest.raises(ValueError, match=r"Row 1 .* has 1 cells; its columns are 2"):
        one_table(["a", 1], ["b"])
    with pytest.raises(ValueError, match="no columns"):
        one_table(columns=())
    with pytest.raises(TypeError):
        one_table(["a", [1]])


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "report.html"
    write(target, "old")
    write(target, "néw \ud800 \n")
    assert target.read_bytes() == "néw ? \n".encode()
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "kept").touch()
    with pytest.raises(OSError):
        write(tmp_path / "report.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        write(tmp_path / "missing" / "report.html", "new")


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return linear(channels) @ [0.2126, 0.7152, 0.0722]


def linear(channels):
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """WCAG 2.2, definition of contrast ratio."""
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_meets_level_aa(theme):
    for ground in (theme["paper"], theme["card"]):
        for text in ("ink", "muted", "accent"):
            assert contrast(theme[text], ground) >= 4.5, text
        for graphic in SERIES:
            assert contrast(theme[graphic], ground) >= 3, graphic
    # Numbers stand on every shade between the card and the full colour of a heat map.
    for share in np.linspace(0, 1, 26):
        ends = [[int(theme[n][i : i + 2], 16) for i in (1, 3, 5)] for n in ("card", "heat")]
        mixed = (1 - share) * np.array(ends[0]) + share * np.array(ends[1])
        assert contrast(theme["ink"], "#" + "".join(f"{round(c):02x}" for c in mixed)) >= 4.5


# Machado, Oliveira and Fernandes (2009), table 1, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def oklab(rgb):
    """Ottosson (2020), from linear sRGB."""
    lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_series_colours_stay_apart_for_every_kind_of_colour_vision(theme, sight):
    seen = []
    for name in SERIES:
        channels = np.array([int(theme[name][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        seen.append(oklab(np.array(SIGHT[sight]) @ linear(channels)))
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.09


def test_both_modes_define_the_same_colours_and_each_light_one_once():
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_the_report_imports_nothing_else_of_the_package_and_no_matplotlib_by_itself():
    for path in Path(secateur.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(n.startswith("secateur.report") or not n.startswith("secateur") for n in names), path
    code = "import sys, secateur.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_the_number_to_four_digits(value):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=6e-4)


@given(st.floats(0, 1))
def test_per_cent_is_right_and_never_rounds_to_none_or_all(value):
    shown = float(percent(value).removesuffix("%"))
    assert shown == pytest.approx(100 * value, rel=6e-3)
    assert (shown == 100) == (value == 1)
    assert (shown == 0) == (value == 0)


@given(st.integers(0, 10**17))
def test_metric_prefixes_say_the_same_number(value):
    for text, unit in ((compact(value), ""), (size(value), "B")):
        amount, _, suffix = text.partition("\N{NO-BREAK SPACE}")
        factor = 1000 ** ["", "k", "M", "G", "T", "P"].index(suffix.removesuffix(unit) if unit else suffix)
        assert float(amount.replace(",", "")) * factor == pytest.approx(value, rel=6e-3)


@given(st.lists(st.one_of(st.none(), st.integers(), st.floats(0.01, 1000), st.text()), max_size=6))
def test_a_column_keeps_its_cells_and_shares_its_decimals(cells):
    shown = column(cells)
    floats = [text for text, cell in zip(shown, cells, strict=True) if isinstance(cell, float)]
    assert len({len(text.partition(".")[2]) for text in floats}) <= 1
    for text, cell in zip(shown, cells, strict=True):
        if isinstance(cell, float):
            assert float(text.replace(",", "")) == pytest.approx(cell, rel=0.06)
        else:
            assert text == ("–" if cell is None else cell if isinstance(cell, str) else f"{cell:,}")


def test_special_values_are_shown_as_what_they_are():
    assert column([float("nan"), float("inf"), -float("inf"), True, None, 0.0]) == [
        "NaN",
        "∞",
        "-∞",
        "yes",
        "–",
        "0",
    ]
    assert column([0.06853, 0.0001198]) == ["0.06853", "0.00012"]
    assert column([97.25, 3e-9]) == ["97.25", "3e-9"]
