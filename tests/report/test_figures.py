"""Figures show the numbers they were given: read back from the SVG's geometry."""

import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from secateur.report import Section, percent, render
from secateur.report.figures import (
    Histogram,
    Series,
    curves,
    grouped_bars,
    heat,
    histograms,
    layer_bars,
    save,
)
from secateur.report.theme import LIGHT

NAN, INF = float("nan"), float("inf")
HOSTILE = "<script>alert(1)</script>"
KINDS = ("curves", "layer_bars", "grouped_bars", "heat", "histograms")


def elements(svg, tag, containing=""):
    return [e for e in ET.fromstring(svg).iter(tag) if containing in e.get("style", "")]


def points(element):
    """Corner points of each subpath of a path of straight lines."""
    parts = [p for p in element.get("d").split("M") if p]
    return [np.array(re.findall(r"-?[\d.]+", part), float).reshape(-1, 2) for part in parts]


def texts(figure):
    return ["".join(e.itertext()) for panel in figure.panels for e in elements(panel, "text")]


def all_figures():
    series = [Series(HOSTILE, [0, 0.5, 0.9], [1, 0.9, 0.5], [0.9, 0.8, 0.4], [1.1, 1, 0.6])]
    return {
        "curves": curves(series, "x", "y", reference=("dense", 1.0)),
        "layer_bars": layer_bars([HOSTILE, "b"], [0.1, 0.2], xlabel="x", reference=("asked", 0.15)),
        "grouped_bars": grouped_bars([HOSTILE], {"dense": [2], HOSTILE: [1]}, "t"),
        "heat": heat([HOSTILE, "b"], ["1", HOSTILE], [[1, 2], [3, 4]], xlabel="x", title="t"),
        "histograms": histograms(
            [Histogram(HOSTILE, [0, 1, 2], [1, 2], [Series(HOSTILE, [0, 2], [1, 1])], [0, 2])]
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_variables_of_the_theme_and_text_is_text(kind):
    figure = all_figures()[kind]
    assert any(text == HOSTILE for text in texts(figure))
    for panel in figure.panels:
        for element in ET.fromstring(panel).iter():
            style = element.get("style", "")
            assert not re.search(r"#[0-9a-f]{3,8}\b", style) and "font-family" not in style
            assert set(re.findall(r"var\(--([\w-]+)\)", style)) <= LIGHT.keys()
            assert element.tag not in ("script", "style", "metadata")


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_configuration_of_matplotlib_neither_matters_nor_changes(kind):
    plain = all_figures()[kind]
    with mpl.rc_context(
        {"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "savefig.bbox": "tight"}
    ):
        before = dict(mpl.rcParams)
        assert all_figures()[kind] == plain
        assert dict(mpl.rcParams) == before


def test_a_curve_passes_through_its_points():
    x, y = np.array([0.0, 0.3, 0.5, 0.9]), np.array([0.97, 0.96, 0.8, 0.1])
    figure = curves([Series("a", x, y)], "x", "y")
    line, _ = elements(figure.svg, "path", "fill:none;stroke:var(--series-1)")  # and the key
    (drawn,) = points(line)
    for values, at in ((x, drawn[:, 0]), (y, -drawn[:, 1])):
        slope, offset = np.polyfit(values, at, 1)
        assert slope > 0
        np.testing.assert_allclose(slope * values + offset, at, atol=0.02)


def test_log_density_spaces_x_by_the_logarithm_of_what_is_left():
    x = np.array([0.0, 0.5, 0.75, 0.875, 0.9375])
    figure = curves([Series("a", x, x)], "x", "y", log_density=True, xformat=percent)
    (drawn,) = points(elements(figure.svg, "path", "fill:none;stroke:var(--series-1)")[0])
    np.testing.assert_allclose(np.diff(drawn[:, 0], n=2), 0, atol=0.05)
    assert {"0%", "50%", "80%", "90%"} <= set(texts(figure))


def test_a_band_lies_between_its_bounds():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0])
    figure = curves([Series("a", x, y, y - 0.5, y + 1)], "x", "y")
    (use,) = elements(figure.svg, "use", "fill-opacity:0.16")
    band = next(e for e in elements(figure.svg, "path") if "#" + e.get("id", "") == use.get("href"))
    (line,) = points(elements(figure.svg, "path", "fill:none;stroke:var(--series-1)")[0])
    corners = np.unique(points(band)[0] + [float(use.get("x")), float(use.get("y"))], axis=0)
    unit = (line[0, 1] - line[2, 1]) / 3
    for at, middle in line:
        heights = corners[abs(corners[:, 0] - at) < 0.2][:, 1]
        assert middle - heights.min() == pytest.approx(unit, abs=0.3)
        assert heights.max() - middle == pytest.approx(unit / 2, abs=0.3)


def test_values_that_are_not_finite_leave_a_gap_and_the_caption_says_so():
    figure = curves([Series("a", range(6), [1, 2, NAN, 3, INF, 4])], "x", "y", caption="Curve.")
    line, _ = elements(figure.svg, "path", "fill:none;stroke:var(--series-1)")  # and the key
    assert [len(part) for part in points(line)][:2] == [2, 1]
    assert figure.caption == "Curve. 2 values are not finite and not drawn."
    nothing = curves([Series("a", [0, 1], [NAN, NAN])], "x", "y")
    assert nothing.caption == "2 values are not finite and not drawn."


def test_wide_and_narrow_ranges_have_distinct_tick_labels():
    for values in ([1e-30, 1e30], [0.97111, 0.97113], [1e6, 1e6 + 3], [-1e-9, 1e-9]):
        labels = texts(curves([Series("a", [0, 1], values)], "", ""))
        assert len(labels) == len(set(labels) - {"0"}) + labels.count("0") and len(labels) > 4
    loss = curves([Series("a", [0, 1, 2], [5, 80, 1.2e5])], "x", "y", log_y=True)
    assert {"10", "100", "1,000", "10,000", "100,000"} <= set(texts(loss))


def test_many_series_differ_in_colour_or_dash():
    figure = curves([Series(f"s{i}", [0, 1], [i, i + 1]) for i in range(12)], "x", "y")
    styles = [e.get("style") for e in elements(figure.svg, "path", "stroke-width:1.9")]
    assert len(set(styles)) == 12


def test_names_are_shown_as_they_are():
    names = ["$\\alpha$", "_hidden", "層", "nul\x00 \x1b", "\ud800"]
    shown = texts(curves([Series(n, [0, 1], [0, 1]) for n in names], "$x$", "y"))
    for name in ("$\\alpha$", "_hidden", "層", "nul\ufffd \ufffd", "\ufffd", "$x$"):
        assert name in shown


def test_layer_bars_are_as_long_as_their_values():
    values = np.array([0.2, 0.4, NAN, 0.8])
    figure = layer_bars(["a", "b", "c", "d"], values, xlabel="sparsity", format=percent)
    bars = [points(e)[0] for e in elements(figure.svg, "path", "fill:var(--accent)")]
    lengths = np.array([np.ptp(bar[:, 0]) for bar in bars])
    np.testing.assert_allclose(lengths / lengths[3], [0.25, 0.5, 0, 1], atol=1e-3)
    assert np.all(np.diff([bar[:, 1].mean() for bar in bars]) > 0)
    assert {"20%", "40%", "–", "80%"} <= set(texts(figure)) and "1 value is not" in figure.caption
    assert "Least 20% (a), most 80% (d)." in figure.alt


def test_a_shared_beginning_of_names_stands_once():
    shown = texts(layer_bars(["model.layers.0.q", "model.layers.1.q"], [1, 2], xlabel="x"))
    assert shown.count("model.layers.") == 1 and {"0.q", "1.q"} <= set(shown)
    assert {"lm_head", "model.q"} <= set(texts(layer_bars(["lm_head", "model.q"], [1, 2], xlabel="x")))


def test_hundreds_of_layers_stay_in_a_readable_height():
    names = [f"block.{i}" for i in range(300)]
    figure = layer_bars(names, np.linspace(0, 1, 300), xlabel="x")
    assert len(elements(figure.svg, "path", "fill:var(--accent)")) == 300
    height = float(ET.fromstring(figure.svg).get("viewBox").split()[3])
    assert height < 1300
    rows = [float(e.get("y")) for e in elements(figure.svg, "text") if re.fullmatch(r"\d+", e.text)]
    assert len(rows) > 70 and min(np.diff(sorted(set(rows)))) >= 14


def test_more_layers_than_can_be_seen_are_joined_into_means():
    values = np.arange(1000.0)[::-1].copy()
    values[1] = NAN  # the mean of its neighbours 999 and 997 stays 998
    figure = layer_bars([f"b.{i}" for i in range(1000)], values, xlabel="x", caption="Many.")
    bars = [np.ptp(points(e)[0][:, 0]) for e in elements(figure.svg, "path", "fill:var(--accent)")]
    expected = np.array([*range(998, 1, -3), 0])
    assert len(bars) == len(expected) == 334
    np.testing.assert_allclose(np.array(bars) / bars[0], expected / 998, atol=1e-3)
    assert figure.caption == (
        "Many. Each row is the mean of 3 layers, named by the first. 1 value is not finite and not drawn."
    )


def test_grouped_bars_share_one_scale_from_zero():
    figure = grouped_bars(["file", "memory"], {"dense": [4, 8], "pruned": [1, NAN]}, "size")
    lengths = {}
    for name, opacity in (("dense", "opacity:0.7"), ("pruned", "opacity:0.85")):
        drawn = elements(figure.svg, "path", opacity)
        lengths[name] = [np.ptp(points(e)[0][:, 0]) for e in drawn][:2]
    unit = lengths["dense"][0] / 4
    np.testing.assert_allclose(
        [*lengths["dense"], *lengths["pruned"]], np.array([4, 8, 1, 0]) * unit, atol=0.02
    )
    assert "file: dense 4, pruned 1." in figure.alt


def test_heat_is_darker_where_values_are_larger():
    table = np.arange(12.0).reshape(3, 4)
    table[2, 3] = NAN
    figure = heat(["a", "b", "c"], list("wxyz"), table, xlabel="x", title="t")
    cells = {}
    for path in elements(figure.svg, "path", "fill:var(--heat)"):
        opacity = float((re.search(r"opacity:([\d.]+)", path.get("style")) or [0, 1])[1])
        for box in points(path):
            if np.ptp(box[:, 1]) > 12:  # not of the key
                cells[tuple(box.mean(axis=0).round())] = opacity
    order = sorted(cells, key=lambda centre: (centre[1], centre[0]))
    assert len(order) == 11
    shades = np.array([cells[centre] for centre in order])
    np.testing.assert_allclose(shades, 0.04 + 0.96 * np.arange(11) / 10, atol=0.96 / 48 + 1e-6)
    assert {"0", "5", "10", "–"} <= set(texts(figure))


def test_large_heat_maps_are_small_files_and_equal_values_have_one_shade():
    figure = heat(
        [f"r{i}" for i in range(300)],
        list("abcdefghi"),
        np.random.default_rng(0).random((300, 9)),
        xlabel="x",
        title="t",
    )
    assert len(figure.svg) < 200_000
    flat = heat(["a"], ["1", "2"], [[5, 5]], xlabel="x", title="t")
    assert len(elements(flat.svg, "path", "var(--heat)")) == 1


def test_a_histogram_has_its_heights_and_its_key():
    counts, after = [1.0, 3.0, 2.0], [0.0, 3.0, 0.0]
    figure = histograms([Histogram("a", [0, 1, 2, 3], counts, [Series("fit", [0, 3], [2, 2])], after)])
    keys, panel = figure.panels
    assert texts(figure)[:3] == ["before", "after", "fit"] and 'class="keys"' in keys
    (outline,) = points(elements(panel, "path", "stroke:var(--muted)")[0])
    heights = -np.unique(outline[:, 1])[::-1]
    assert np.ptp(heights) > 0
    np.testing.assert_allclose((heights - heights[0]) / np.ptp(heights), [0, 0.5, 1], atol=1e-2)


def test_panels_without_overlays_need_no_key():
    assert len(histograms([Histogram("a", [0, 1], [5]), Histogram("b", [0, 1], [0])]).panels) == 2


def test_saved_figures_stand_alone(tmp_path):
    for name, figure in all_figures().items():
        save(figure, tmp_path / f"{name}.svg")
        text = (tmp_path / f"{name}.svg").read_text()
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text and "calc(" not in text and LIGHT["card"] in text
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert len(ids) == len(set(ids))


def test_figures_fit_in_a_page():
    html = render("t", "", [], [Section("s", figures=list(all_figures().values()))])
    assert html.count('role="img"') == 5 and "<script" not in html


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda: curves([], "x", "y"), "at least one series"),
        (lambda: curves([Series("a", [], [])], "x", "y"), "'a' has no points"),
        (lambda: curves([Series("a", [1], [1, 2])], "x", "y"), "different lengths"),
        (lambda: curves([Series("a", [1], [1], low=[0])], "x", "y"), "only one side"),
        (lambda: curves([Series("a", [NAN], [1])], "x", "y"), "x that is not finite"),
        (lambda: curves([Series("a", [1], [0])], "x", "y", log_y=True), "at or below zero"),
        (lambda: curves([Series("a", [1], [0])], "x", "y", log_density=True), r"outside \[0, 1\)"),
        (
            lambda: curves([Series("a", [1], [1])], "x", "y", reference=("dense", NAN)),
            "'dense' must be finite",
        ),
        (lambda: layer_bars([], [], xlabel="x"), "a value for each name"),
        (lambda: layer_bars(["a"], [1, 2], xlabel="x"), "got 1 and 2"),
        (lambda: layer_bars(["a"], [1], xlabel="x", reference=("asked", INF)), "'asked' must be finite"),
        (lambda: grouped_bars([], {"a": []}, "t"), "at least one label"),
        (lambda: grouped_bars(["a"], {"g": [1, 2]}, "t"), "'g' has 2 values for 1 labels"),
        (lambda: grouped_bars(["a"], {"g": [-1]}, "t"), "negative"),
        (lambda: heat(["a"], ["b"], [[1, 2]], xlabel="x", title="t"), r"got the shape \(1, 2\)"),
        (lambda: heat([], [], [], xlabel="x", title="t"), "0 rows"),
        (lambda: histograms([]), "at least one panel"),
        (lambda: histograms([Histogram("a", [0, 1], [1, 2])]), "one fewer than its edges"),
        (lambda: histograms([Histogram("a", [0, 1], [NAN])]), "finite counts"),
        (lambda: histograms([Histogram("a", [0, 1], [1], after=[NAN])]), "finite after"),
        (lambda: histograms([Histogram("a", [1, 0], [1])]), "increase"),
    ],
)
def test_mistakes_in_the_data_are_named(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
