"""What the tests share: the data directory, the browser, explicit generators."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

IN_CI = os.environ.get("CI") == "true"
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

settings.register_profile("secateur", deadline=None, derandomize=IN_CI, print_blob=True)
settings.load_profile("secateur")


def data_directory() -> Path:
    return Path(os.environ.get("SECATEUR_DATA") or DEFAULT_DATA)


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def skip_or_fail(reason: str) -> None:
    """In CI nothing that a test needs may be missing unnoticed."""
    if IN_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("realdata"):
        for folder in [data_directory() / name for name in marker.args] or [data_directory()]:
            if not folder.is_dir():
                skip_or_fail(
                    f"The data folder {folder} is missing; set SECATEUR_DATA to the folder above it."
                )
    if item.get_closest_marker("browser") and not (chromium() and shutil.which("chromedriver")):
        skip_or_fail("Chromium and chromedriver are not both on PATH.")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The directory of the real data; a test that reads from it is marked ``realdata("folder", ...)``."""
    return data_directory()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    """A headless Chromium that reaches no network; its tests are marked ``browser``."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1280,1600",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def compiled() -> None:
    """The test needs compiled kernels for this processor."""
    from secateur.runtime import native

    if native.library() is None:
        skip_or_fail("There are no compiled kernels: install a C++ compiler and the package again.")
