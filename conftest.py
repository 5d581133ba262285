"""For tests and doctests alike: shapes are checked, nothing is fetched, no window opens."""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

from tests import typechecker

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "secateur" in sys.modules:
    raise pytest.UsageError("secateur was imported before conftest.py, so its shapes would go unchecked.")
install_import_hook("secateur", f"{typechecker.__name__}.check")

torch.set_num_threads(1)  # the workers of pytest-xdist already fill the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch's global generator before each test; the value serves explicit generators."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def names(request: pytest.FixtureRequest, doctest_namespace: dict[str, object]) -> None:
    """What an example in a docstring finds without importing it."""
    if isinstance(request.node, pytest.DoctestItem):
        import secateur

        doctest_namespace.update(torch=torch, sc=secateur)
