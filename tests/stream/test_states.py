"""Hidden states in memory and in files: the same trees, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_flatten

from secateur.core.errors import StatsError
from secateur.stream.states import States

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.text(max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]).map(
        lambda kind: torch.arange(6).reshape(2, 3).to(kind)
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)


def alike(a: Any, b: Any) -> bool:
    (x, p), (y, q) = tree_flatten(a), tree_flatten(b)
    if p != q or len(x) != len(y):
        return False
    pairs = zip(x, y, strict=True)
    return all(
        torch.equal(s, t) and s.dtype == t.dtype if isinstance(s, Tensor) else s == t for s, t in pairs
    )


@settings(max_examples=50, deadline=None)
@given(trees)
def test_trees_come_back_as_they_were_put(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("states")
    for states in (States(), States(folder / "a"), States(folder / "b", limit=0)):
        states.put(3, 0, tree)
        assert alike(states.get(3, 0), tree)


def test_what_is_kept_is_a_copy(tmp_path: Path) -> None:
    for states in (States(), States(tmp_path / "files", limit=0)):
        x = torch.ones(4)
        states.put(0, 0, (x, None))
        x.zero_()
        assert bool((states.get(0, 0)[0] == 1).all())


def test_memory_is_limited_and_files_stay_until_settled(tmp_path: Path) -> None:
    states = States(tmp_path, limit=100)
    for i in range(3):
        states.put(0, i, torch.full((10,), float(i)))  # 40 bytes each
    assert states.peak == 80
    assert [float(states.get(0, i)[0]) for i in range(3)] == [0, 1, 2]
    states.put(1, 0, torch.ones(10))
    states.drop(0)
    assert len(list(tmp_path.iterdir())) == 4
    states.settle()
    assert len(list(tmp_path.iterdir())) == 1
    states.put(2, 0, torch.ones(20))
    assert states.peak == 80, "what was dropped is memory again"


def test_a_resumed_run_finds_its_states_and_nothing_else(tmp_path: Path) -> None:
    first = States(tmp_path)
    for slot in (3, 4):
        for i in range(2):
            first.put(slot, i, torch.full((2,), 10.0 * slot + i))
    second = States(tmp_path)
    second.resume({4}, 2)
    assert [float(second.get(4, i)[0]) for i in range(2)] == [40, 41]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(StatsError, match="missing"):
        States(tmp_path).resume({4}, 3)


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    class Output(dict[str, Any]):
        pass

    with pytest.raises(StatsError, match="Output"):
        States(tmp_path).put(0, 0, Output(x=torch.ones(1)))
