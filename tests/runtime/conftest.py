"""What the tests of sparse kernels share."""

import pytest

from secateur.runtime import native
from tests.conftest import skip_or_fail


@pytest.fixture
def compiled():
    """The test needs compiled kernels for this processor."""
    if native.library() is None:
        skip_or_fail("There are no compiled kernels: install a C++ compiler and the package again.")
