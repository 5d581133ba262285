"""Memory does not grow with the number of blocks, of which all together fit neither memory nor addresses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint_memory as benchmark

BLOCKS = 12  # 460 MB
LIMIT = 1.2e9  # bytes, 0.9e9 of which libraries take


@pytest.mark.skipif(sys.platform != "linux", reason="Reads /proc.")
def test_a_checkpoint_larger_than_the_space_for_it(tmp_path: Path) -> None:
    source, out = tmp_path / "dense", tmp_path / "pruned"
    source.mkdir()
    size = benchmark.write(source, BLOCKS)
    found = benchmark.prune(source, out, LIMIT / 1e9, "Wanda")
    empty = found["empty"]
    assert empty["address_bytes"] + size > LIMIT, "the limit does not bite"
    assert found["peak_bytes"] - empty["peak_bytes"] < 0.6 * size
    assert benchmark.check(source, out) == 7 * BLOCKS
