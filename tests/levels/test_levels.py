"""Allocations that are measured: grids and their totals, the exact assignment, evolution, files."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.core.errors import (
    ArtifactError,
    BudgetError,
    PatternError,
    SecateurError,
    SelectionError,
    SparsityError,
    StatsError,
)
from secateur.core.topk import count
from secateur.levels.case import Data, opened, parted
from secateur.levels.cheapest import cheapest
from secateur.levels.evolve import Evolution, Levels, generation, offspring
from secateur.levels.grid import Grid, grid_of

# ------ the grid


def layers_of(sizes: Sequence[int], pattern: sc.Pattern | None = None) -> list[sc.Layer]:
    pattern = pattern or sc.Unstructured()
    found = []
    for i, n in enumerate(sizes):
        weight = torch.empty(1, n * pattern.unit, device="meta")
        found.append(
            sc.Layer(f"l{i}", weight.shape, weight.shape, pattern, lambda w=weight: w, lambda w=weight: w)
        )
    return found


sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=12)
sparsities = st.floats(0, 1)


def total(grid: Grid, levels: Sequence[int]) -> int:
    shares = grid.shares(levels)
    return sum(count(shares[name], n) for name, n in zip(grid.names, grid.units, strict=True))


@given(sizes, sparsities, st.floats(0.01, 0.3), st.floats(0.01, 0.5), st.integers(0, 2**31))
def test_the_total_is_exact_at_any_levels_of_search_and_assignment(sizes, sparsity, step, reach, seed):
    grid = grid_of(layers_of(sizes), sparsity, step, reach)
    asked = count(sparsity, sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(len(grid.levels(i)), generator=generator).tolist() for i in range(len(sizes))]
    found = [(0,) * len(sizes), cheapest(grid, costs)]
    found += offspring(Evolution(offspring=5), grid, found[1], generator)
    for levels in found:
        assert grid.holds(levels)
        assert total(grid, levels) == asked
        for i, n in enumerate(sizes):
            assert 0 <= grid.removed(i, levels[i]) <= n
            assert abs(grid.share(i, levels[i]) - sparsity) <= reach + 1 / n + 1e-9


@given(sizes, st.floats(0.01, 0.3))
@example([91], 0.015625)  # 1.42 units, where one and two are as near
def test_steps_are_near_the_asked_one(sizes, step):
    grid = grid_of(layers_of(sizes), 0.5, step, 0.5)
    finest = min(grid.step)
    for n, s in zip(sizes, grid.step, strict=True):
        assert s % finest == 0 and (s // finest).bit_count() == 1
        if step * n >= finest:
            assert 0.7 <= s / (step * n) <= 1.42
    # What the smallest layer gives any other can take.
    least = step * min(sizes)
    assert max(1, round(least)) <= finest <= max(1.5, 1.42 * least)


def test_a_grid_of_blocks_counts_blocks_and_one_of_n_of_m_is_refused():
    grid = grid_of(layers_of([40, 80], sc.Block(2, 2)), 0.5, 0.1, 0.2)
    assert (grid.base, grid.step, grid.low, grid.high) == ((20, 40), (4, 8), (-2, -2), (2, 2))
    with pytest.raises(PatternError, match="nothing to distribute"):
        sc.by_error(model_and_data()[0], 0.5, batches=model_and_data()[1], pattern=sc.NM(2, 4))
    with pytest.raises(SecateurError, match="sparsities above 0"):
        grid_of(layers_of([5]), 0.5, 0.0, 0.2)


# ------ exact assignment


def brute(grid: Grid, costs: Sequence[Sequence[float]]) -> float:
    """The least cost of all levels that meet the total."""
    least = np.inf
    for levels in itertools.product(*(grid.levels(i) for i in range(len(costs)))):
        if grid.holds(levels):
            least = min(least, sum(costs[i][k - grid.low[i]] for i, k in enumerate(levels)))
    return least


@settings(max_examples=25)
@given(st.lists(st.integers(4, 200), min_size=1, max_size=4), st.floats(0.2, 0.8), st.integers(0, 2**31))
def test_no_levels_cost_less(sizes, sparsity, seed):
    grid = grid_of(layers_of(sizes), sparsity, 0.1, 0.25)
    rng = np.random.default_rng(seed)
    costs = [rng.random(len(grid.levels(i))).tolist() for i in range(len(sizes))]
    levels = cheapest(grid, costs)
    got = sum(costs[i][k - grid.low[i]] for i, k in enumerate(levels))
    assert got == pytest.approx(brute(grid, costs), abs=1e-12)


def test_many_layers_of_unlike_size_take_no_time():
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 10**8, 500).tolist()
    grid = grid_of(layers_of(sizes), 0.7, 0.05, 0.25)
    costs = [np.sort(rng.random(len(grid.levels(i)))).tolist() for i in range(500)]
    assert total(grid, cheapest(grid, costs)) == count(0.7, sum(sizes))


# ------ evolution


def additive(costs: Sequence[Sequence[float]], grid: Grid) -> Any:
    def fitness(levels: Levels, batches: Sequence[int]) -> float:
        assert grid.holds(levels)
        return sum(costs[i][k - grid.low[i]] for i, k in enumerate(levels))

    return fitness


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_the_optimum_of_an_additive_fitness_and_never_gets_worse(seed):
    rng = np.random.default_rng(seed)
    grid = grid_of(layers_of([100, 100, 200, 410, 100, 200]), 0.5, 0.1, 0.2)
    costs = [np.cumsum(np.cumsum(rng.random(len(grid.levels(i))))).tolist() for i in range(6)]
    fitness = additive(costs, grid)
    how = Evolution(offspring=16, seed=seed)
    levels: Levels = (0,) * 6
    seen = [fitness(levels, range(4))]
    for number in range(40):
        levels, far = generation(how, grid, levels, seen[-1], number, 4, fitness)
        assert far == fitness(levels, range(4)) <= seen[-1]
        seen.append(far)
    assert seen[-1] == pytest.approx(brute(grid, costs), abs=1e-12)
    assert seen[-1] < seen[0]


def test_stages_see_more_and_more_batches_of_fewer_and_fewer():
    grid = grid_of(layers_of([100] * 8), 0.5, 0.1, 0.2)
    calls: list[int] = []

    def fitness(levels: Levels, batches: Sequence[int]) -> float:
        calls.append(len(batches))
        return 1.0 + sum(k * k for k in levels)

    start = (0,) * 8
    assert generation(Evolution(offspring=20), grid, start, 1.0, 0, 32, fitness) == (start, 1.0)
    assert calls == [2] * 20 + [8] * 8 + [32] * 2


def test_offspring_differ_from_their_parent_and_each_other_and_may_be_few():
    grid = grid_of(layers_of([100, 100]), 0.5, 0.1, 0.1)
    generator = torch.Generator().manual_seed(0)
    assert set(offspring(Evolution(), grid, (0, 0), generator)) == {(1, -1), (-1, 1)}
    alone = grid_of(layers_of([100]), 0.5, 0.1, 0.1)
    assert not offspring(Evolution(), alone, (0,), generator)
    for wrong in ({"offspring": 0}, {"switches": 0}, {"survivors": (1,)}, {"shares": (0.0, 1.0)}):
        with pytest.raises(SecateurError):
            Evolution(**wrong)


# ------ on models


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def model_and_data(blocks: int = 3, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(blocks)), nn.Linear(8, 5)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 + 0.3 * (i % 3)))
    mix = torch.randn(8, 8, generator=generator)
    return model, [(torch.randn(8, 12, 8, generator=generator) @ mix).to(dtype) for _ in range(8)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


KINDS = [
    (sc.Unstructured(), torch.float32),
    (sc.PerRow(), torch.float64),
    (sc.Block(2, 2), torch.bfloat16),
]


@pytest.mark.parametrize(("pattern", "dtype"), KINDS, ids=str)
def test_the_model_is_as_before_and_prunes_with_what_was_found(pattern, dtype):
    model, data = model_and_data(dtype=dtype)
    before, pointers = state(model), [p.data_ptr() for p in model.parameters()]
    model.train()
    found = sc.by_search(model, 0.6, batches=data, pattern=pattern, generations=2, offspring=4, step=0.1)
    assert same(before, state(model)) and model.training
    assert pointers == [p.data_ptr() for p in model.parameters()]
    distances = [one.distance for one in found.history]
    tried = ["uniform", "by error", "generation 1", "generation 2"]
    assert [one.what for one in found.history] == tried
    assert distances[2:] == sorted(distances[2:], reverse=True) and min(distances) == distances[-1]
    report = sc.prune_(model, sc.SparseGPT(), 0.6, pattern=pattern, batches=data, allocation=found)
    units = report.entries // pattern.unit
    assert report.removed == count(0.6, units) * pattern.unit
    assert {layer.name: layer.sparsity for layer in report.layers} == pytest.approx(dict(found.shares))
    assert report.settings["allocation"] == repr(found)


def test_levels_are_those_of_the_solver_on_what_the_dense_model_passes_on():
    model, data = model_and_data()
    heard: list[Tensor] = []
    handle = model[1].down.register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    rows = torch.cat(heard)
    objective = sc.solvers.Quadratic(rows.T @ rows / len(rows), 0.01)
    settings_ = Data(data, sc.SparseGPT(), sc.Unstructured(), None, 0.1, 0.3, 0.0, None)
    with torch.no_grad(), opened(model, 0.5, settings_) as case:
        grid = case.database.grid
        i = grid.names.index("1.down.weight")
        for level, error in zip(grid.levels(i), case.database.errors(i), strict=True):
            solved = sc.SparseGPT()(
                model[1].down.weight.detach(), objective, sc.Unstructured(), grid.share(i, level)
            )
            weight = case.database.weight(i, level)
            assert int((weight == 0).sum()) == grid.removed(i, level)
            assert error == pytest.approx(solved.error, rel=0.02)
            assert torch.allclose(weight, solved.weight, atol=1e-3)
        case.stitched.set((None,) * i + (grid.high[i],) + (None,) * (len(grid.names) - i - 1))
        assert torch.equal(model[1].down.weight, case.database.weight(i, grid.high[i]))


def test_by_error_is_the_least_sum_of_the_errors_of_all_allocations():
    model, data = model_and_data(blocks=2)
    found = sc.by_error(model, 0.5, batches=data, step=0.1, reach=0.2, probe=False)
    settings_ = Data(data, sc.SparseGPT(), sc.Unstructured(), None, 0.1, 0.2, 0.125, None)
    with torch.no_grad(), opened(model, 0.5, settings_) as case:
        grid = case.database.grid
        errors = [case.database.errors(i) for i in range(len(grid.names))]
        sums = {
            tuple(grid.shares(levels).values()): sum(errors[i][k - grid.low[i]] for i, k in enumerate(levels))
            for levels in itertools.product(*(grid.levels(i) for i in range(len(grid.names))))
            if grid.holds(levels)
        }
    assert sums[tuple(found.shares.values())] == pytest.approx(min(sums.values()), rel=1e-6)


def test_a_search_resumes_to_the_bit_from_a_folder(tmp_path):
    model, data = model_and_data()
    asked: dict[str, Any] = {"batches": data, "offspring": 4, "step": 0.2, "seed": 3}
    whole = sc.by_search(model, 0.6, generations=3, **asked)
    short = sc.by_search(model, 0.6, generations=1, folder=tmp_path, **asked)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert times
    assert sc.by_search(model, 0.6, generations=3, folder=tmp_path, **asked) == whole
    assert sc.by_search(model, 0.6, generations=1, folder=tmp_path, **asked) == short
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == times
    # Other settings of the solver are other levels; a layer that is gone is solved again.
    next(iter(times)).unlink()
    assert sc.by_search(model, 0.6, generations=3, folder=tmp_path, **asked) == whole
    sc.by_error(model, 0.6, batches=data, solver=sc.SparseGPT(damping=0.1), step=0.2, folder=tmp_path)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2
    for file in tmp_path.rglob("search-*.json"):
        file.write_text(file.read_text().replace("[[", "[[7, ", 1))
    with pytest.raises(ArtifactError, match="begin the search anew"):
        sc.by_search(model, 0.6, generations=3, folder=tmp_path, **asked)
    for file in times:
        file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged: remove it"):
        sc.by_search(model, 0.6, generations=3, folder=tmp_path, **asked)


def test_an_error_midway_leaves_the_model_and_a_state_to_go_on_from(tmp_path, monkeypatch):
    model, data = model_and_data()
    before = state(model)
    asked: dict[str, Any] = {"batches": data, "generations": 3, "offspring": 3, "step": 0.2}
    real, calls, stop = F.silu, [0], [0]

    def failing(x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == stop[0]:
            raise KeyboardInterrupt
        return real(x)

    monkeypatch.setattr(F, "silu", failing)
    whole = sc.by_search(model, 0.6, **asked)
    for last in (5, calls[0] // 4, calls[0] // 4, calls[0] // 4):
        calls[0], stop[0] = 0, last
        with pytest.raises(KeyboardInterrupt):
            sc.by_search(model, 0.6, folder=tmp_path, **asked)
        assert same(before, state(model))
    monkeypatch.undo()
    assert sc.by_search(model, 0.6, folder=tmp_path, **asked) == whole


def test_held_out_batches_play_no_part():
    assert [len(x) for x in parted(list(range(16)), 0.125)] == [14, 2]
    assert parted(list(range(4)), 0.125) == ([0, 1, 3], [2])
    assert parted([1], 0.5) == ([1], [])
    model, data = model_and_data()
    found = sc.by_error(model, 0.6, batches=data, step=0.1)
    other = [*data]
    other[4] = other[4] * 2 + 1
    again = sc.by_error(model, 0.6, batches=other, step=0.1)
    assert found.shares == again.shares
    assert [one.distance for one in found.history] == [one.distance for one in again.history]
    assert found.history[1].held_out != again.history[1].held_out
    assert sc.by_error(model, 0.6, batches=data[:1], step=0.1).history[0].held_out is None


def test_what_is_wrong_is_said():
    model, data = model_and_data()
    with pytest.raises(StatsError, match="No batches"):
        sc.by_error(model, 0.5, batches=[])
    with pytest.raises(SparsityError):
        sc.by_search(model, 1.5, batches=data)
    with pytest.raises(SecateurError, match="held_out is a share"):
        sc.by_error(model, 0.5, batches=data, held_out=1.0)
    with pytest.raises(SecateurError, match="generations"):
        sc.by_search(model, 0.5, batches=data, generations=-1)


# ------ the allocation as such


def test_a_measured_allocation_is_for_its_layers_and_total(tmp_path):
    shares = {"l0": 0.25, "l1": 0.75}
    found = sc.Measured("by_error", 0.5, shares, (sc.Tried("uniform", 0.5, None),), {"solver": "SparseGPT()"})
    layers = layers_of([8, 8])
    assert found(layers, 0.5) == found(layers, None) == shares
    with pytest.raises(BudgetError, match=r"for a sparsity of 0\.5, not of 0\.6"):
        found(layers, 0.6)
    with pytest.raises(SelectionError, match="l2 was not measured"):
        found(layers_of([8, 8, 8]), 0.5)
    with pytest.raises(SelectionError, match="l1 was measured but is not selected"):
        found(layers[:1], 0.5)
    assert sum(found(layers_of([7, 7]), 0.5)[n] * 7 for n in shares) == pytest.approx(7)
    found.save(tmp_path / "a.json")
    again = sc.Measured.load(tmp_path / "a.json")
    assert again == found and hash(again) == hash(found) and repr(again) == repr(found)
    assert len(repr(found)) < 50 and repr(found).startswith("Measured(by_error, 0.5, ")
    assert repr(sc.Measured("by_error", 0.5, shares | {"l0": 0.26})) != repr(found)


@pytest.mark.parametrize(
    "wrong", ["", "[]", '{"format": 2}', '{"format": 1, "how": "x"}', "share", "history"]
)
def test_a_file_that_is_no_allocation_is_refused(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "a.json"
    sc.Measured("by_error", 0.5, {"a": 0.5}).save(file)
    data = json.loads(file.read_text())
    if wrong == "share":
        wrong = json.dumps(data | {"shares": {"a": 1.5}})
    elif wrong == "history":
        wrong = json.dumps(data | {"history": [["x"]]})
    file.write_text(wrong)
    with pytest.raises(ArtifactError):
        sc.Measured.load(file)
    with pytest.raises(ArtifactError):
        sc.Measured.load(tmp_path / "none.json")


# ------ a language model


@pytest.mark.realdata("stories260k", "tinystories")
@pytest.mark.slow
def test_searched_shares_beat_uniform_ones_on_stories_that_were_not_seen(data_root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_root / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = json.loads((data_root / "tinystories" / "stories.json").read_text())

    def windows(part: list[str]) -> list[dict[str, Tensor]]:
        ids = [tokenizer(s, return_tensors="pt", truncation=True, max_length=128).input_ids for s in part]
        full = torch.cat([x for x in ids if x.shape[1] == 128])
        return [{"input_ids": x} for x in full.split(4)]

    data, test = windows(stories[:24]), windows(stories[600:630])
    found = sc.by_search(model, 0.7, batches=data, generations=6, offspring=10)
    uniform, by_error, last = found.history[0], found.history[1], found.history[-1]
    assert last.distance < min(uniform.distance, by_error.distance)
    assert last.held_out is not None and uniform.held_out is not None
    assert last.held_out < uniform.held_out

    def loss(allocation: sc.Allocation) -> float:
        pruned = copy.deepcopy(model)
        report = sc.prune_(pruned, sc.SparseGPT(), 0.7, batches=data, allocation=allocation)
        assert report.removed == count(0.7, report.entries)
        with torch.no_grad():
            return float(np.mean([pruned(**x, labels=x["input_ids"]).loss for x in test]))

    assert loss(found) < loss(sc.uniform)
