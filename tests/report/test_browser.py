"""The page in a real browser: nothing fetched, nothing wider than a phone, both colour schemes."""

import numpy as np
import pytest

from secateur.report import write

pytestmark = pytest.mark.browser

BOXES = """return [...document.querySelectorAll('svg')].map(
    picture => [picture.getBoundingClientRect().width, picture.getBoundingClientRect().height])"""
COLOURS = "let s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"


@pytest.fixture
def show(browser, tmp_path):
    def show(html, width=1200, scheme="light", media=""):
        write(tmp_path / "report.html", html)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get((tmp_path / "report.html").as_uri())
        return browser

    return show


def fetched(browser):
    return browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")


def lightness(browser, colours=COLOURS):
    """Mean channel of each colour, 0 to 255: of the page's background and text unless said otherwise."""
    return [
        np.mean([float(c) for c in colour[colour.index("(") + 1 : -1].split(",")[:3]])
        for colour in browser.execute_script(colours)
    ]


def test_the_console_is_silent_and_nothing_is_fetched(show, page):
    browser = show(page)
    assert browser.get_log("browser") == []
    assert fetched(browser) == []
    # That the two checks can fail: a picture from elsewhere is blocked by the page's own policy.
    show(page.replace("<main>", '<main><img src="picture.png"><script>document.title = "ran"</script>'))
    assert {entry["level"] for entry in browser.get_log("browser")} == {"SEVERE"}
    assert browser.title != "ran"


@pytest.mark.parametrize("width", [360, 1200])
def test_every_picture_shows_and_the_page_never_scrolls_sideways(show, page, width):
    browser = show(page, width)
    boxes = np.array(browser.execute_script(BOXES))
    assert len(boxes) == 4 + 13 and (boxes > 10).all()
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return innerWidth") == width
    for selector, least in (("figure text", 8.5 if width == 360 else 9), ("td", 14), ("p", 13)):
        sizes = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => {"
            "let s = e.ownerSVGElement, z = s ? s.getScreenCTM().a : 1;"
            "return z * parseFloat(getComputedStyle(e).fontSize)})",
            selector,
        )
        assert min(sizes) >= least, selector


def test_wide_tables_scroll_inside_their_own_box_with_the_names_in_view(show, page):
    browser = show(page, 360)
    inside, box, left, moved = browser.execute_script(
        "let b = [...document.querySelectorAll('.scroll')].pop(), h = b.querySelector('tbody th');"
        "let before = h.getBoundingClientRect().left; b.scrollLeft = 200;"
        "return [b.scrollWidth, b.clientWidth, before, h.getBoundingClientRect().left]"
    )
    assert inside > box and left == pytest.approx(moved, abs=1)


def test_dark_mode_is_dark_with_light_text_and_its_pictures_follow(show, page):
    stroke = "let e = document.querySelector('svg text'); return [getComputedStyle(e).fill]"
    browser = show(page, scheme="dark")
    ground, text = lightness(browser)
    assert ground < 60 and text > 200
    (dark_fill,) = lightness(browser, stroke)
    browser = show(page, scheme="light")
    ground, text = lightness(browser)
    assert ground > 230 and text < 60
    (light_fill,) = lightness(browser, stroke)
    assert dark_fill > 120 > light_fill


def test_print_is_light_even_from_a_dark_screen_and_shows_whole_tables(show, page):
    browser = show(page, scheme="dark", media="print")
    ground, text = lightness(browser)
    assert ground == 255 and text < 60
    assert browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].every(b => b.scrollHeight <= b.clientHeight)"
    )


def test_numbers_can_be_selected_in_tables_and_pictures(show, page):
    browser = show(page)
    selected = browser.execute_script(
        "getSelection().selectAllChildren(document.body); return String(getSelection())"
    )
    assert "45,088,768" in selected  # a cell of the table
    assert "4.9\N{NO-BREAK SPACE}MB" in selected  # a label of a bar
