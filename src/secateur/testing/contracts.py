"""Contracts of the nouns that others may add to. Each raises `AssertionError` saying what is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.allocation import Allocation, Layer
from secateur.collect import collect
from secateur.core.errors import PatternError, StatsError
from secateur.core.names import Where, select
from secateur.core.topk import count
from secateur.criteria import Criterion
from secateur.patterns import NM, Pattern, PerRow, Unstructured
from secateur.solvers import Quadratic, Solver

_SPARSITIES = (0.0, 0.003, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.55, 0.6, 2 / 3, 0.75, 0.9, 0.995, 1.0)
_SHAPES = ((1, 1), (1, 7), (5, 3), (4, 16), (12, 8), (24, 48), (64, 64))


def check_pattern(pattern: Pattern) -> None:
    """A pattern removes exactly what was asked, or refuses; deterministic, nested, larger means keep.

    On matrices with and without ties, and for sparsities from 0 to 1:

    - `keep` removes `unit * count(sparsity, units)` entries, which is what `reachable` says;
    - where `reachable` raises `PatternError`, so does `keep`; 0 and 1 can always be reached;
    - the entries of a unit come and go together;
    - more sparsity keeps a subset of what less sparsity keeps;
    - a unit whose score is raised above all others is kept, one of `-inf` is dropped;
    - the same scores give the same mask, however they are stored, and are not changed.

    Raises `AssertionError` if one of these does not hold, or no matrix of up to 64 x 64 fits the pattern.
    """
    shapes = [s for s in map(torch.Size, _SHAPES) if _fits(pattern, s)]
    _require(len(shapes) > 0, f"{pattern} fits none of the matrices {_SHAPES}")
    for shape in shapes:
        for what, scores in _score_matrices(shape):
            where = f"{pattern} on {what} scores of shape {tuple(shape)}"
            keeps = _check_counts(pattern, scores, where)
            for (_, more), (s, fewer) in pairwise(keeps):
                _require(not bool((fewer & ~more).any()), f"{where} at {s}: keeps what less sparsity removes")
    small = [s for s in shapes if s.numel() <= 1 << 11]
    for shape in small[-2:]:
        _check_units(pattern, shape)


def check_solver(solver: Solver, patterns: Sequence[Pattern] = (Unstructured(), PerRow(), NM(2, 4))) -> None:
    """A solver prunes exactly as asked, says the error that it makes, and does better than no update.

    On layers of 24 outputs and of one, with correlated inputs, one of them always zero, for each pattern and
    sparsities from 0 to 1:

    - `keep` has the count of the pattern, and its shape: `pattern.keep` of the mask itself changes nothing;
    - weights are float32, finite, zero where not kept, and go first where inputs are always zero;
    - at sparsity 0 the weights of live inputs stay as they are;
    - `error` is that of the weights, at most that of magnitude pruning without an update, and grows with the
      sparsity;
    - the same call gives the same result, and changes nothing that it was given.

    Raises `AssertionError` if one of these does not hold.
    """
    matrix, gram = _layer_problem()
    for pattern, weight in product(patterns, (matrix, matrix[:1])):
        last = 0.0
        for sparsity in (0.0, 0.5, 0.75, 1.0) if isinstance(pattern, Unstructured | PerRow) else (0.0, 0.5):
            where = f"{solver} with {pattern} at {sparsity} on {len(weight)} rows"
            given = weight.clone(), gram.clone()
            objective = Quadratic(given[1], solver.damping)
            solved = solver(given[0], objective, pattern, sparsity)
            _require(
                torch.equal(given[0], weight) and torch.equal(given[1], gram), f"{where}: changes its input"
            )
            again = solver(weight, Quadratic(gram, solver.damping), pattern, sparsity)
            _require(torch.equal(solved.weight, again.weight), f"{where}: two calls differ")
            _require(solved.weight.dtype == torch.float32, f"{where}: weights of {solved.weight.dtype}")
            _require(bool(solved.weight.isfinite().all()), f"{where}: weights that are not finite")
            _require(not bool(solved.weight[~solved.keep].any()), f"{where}: a removed weight is not zero")
            gone = int((~solved.keep).sum())
            asked = round(pattern.reachable(weight.shape, sparsity) * weight.numel())
            _require(gone == asked, f"{where}: removes {gone} weights instead of {asked}")
            _require(
                torch.equal(pattern.keep(solved.keep.float(), sparsity), solved.keep),
                f"{where}: no such pattern",
            )
            error = objective.error(solved.weight, weight)
            _require(abs(error - solved.error) <= 1e-5 * max(1e-3, error), f"{where}: the error is {error}")
            size = weight.abs().masked_fill(objective.dead_I, -torch.inf)
            plain = objective.error(weight * pattern.keep(size, sparsity), weight)
            _require(
                error <= plain * (1 + 1e-4) + 1e-9, f"{where}: {error} where plain removal makes {plain}"
            )
            _require(error >= last - 1e-6, f"{where}: a smaller error than with less sparsity")
            if sparsity == 0:
                live = ~objective.dead_I
                same = torch.allclose(solved.weight[:, live], weight[:, live], atol=1e-4)
                _require(same, f"{where}: weights change although none goes")
            if sparsity in (0.5, 0.75) and isinstance(pattern, Unstructured):
                _require(
                    not bool(solved.keep[:, objective.dead_I].any()),
                    f"{where}: keeps weights of a dead input",
                )
            last = error


def _layer_problem() -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of unlike scale, one of them always zero."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=draw) / 32**0.5
    x = torch.randn(400, 32, generator=draw) @ mix * torch.randn(32, generator=draw).exp()
    x[:, 5] = 0
    return torch.randn(24, 32, generator=draw), x.T @ x / len(x)


def check_allocation(allocation: Allocation, pattern: Pattern | None = None) -> None:
    """An allocation hands out exactly the total asked, in [0, 1] for each layer, and changes nothing.

    For sparsities from 0 to 1, and layers of unlike sizes and scales, with ties, zeros, and all alike:

    - every layer gets a sparsity in [0, 1], and the units removed sum to `count(sparsity, all units)`;
    - a larger total takes nothing from a layer's removals, but for one unit of rounding;
    - the same layers get the same sparsities, and their weights and scores are not changed.

    Only for allocations that take a total; `pattern` is `Unstructured()` if None.

    Raises `AssertionError` if one of these does not hold.
    """
    pattern = pattern or Unstructured()
    for what, weights in _layer_sets(pattern):
        layers = [_layer(f"layer{i}", w, pattern) for i, w in enumerate(weights)]
        before = [w.clone() for w in weights]
        units = sum(layer.units for layer in layers)
        last: dict[str, int] = {}
        for sparsity in _SPARSITIES:
            where = f"{allocation} with {pattern} on layers of {what} at {sparsity}"
            shares = allocation(layers, sparsity)
            _require(shares.keys() == {layer.name for layer in layers}, f"{where}: covers {list(shares)}")
            _require(all(0 <= s <= 1 for s in shares.values()), f"{where}: a share outside [0, 1]: {shares}")
            gone = {layer.name: count(shares[layer.name], layer.units) for layer in layers}
            asked = count(sparsity, units)
            got = sum(gone.values())
            _require(got == asked, f"{where}: removes {got} of {units} units instead of {asked}")
            _require(allocation(layers, sparsity) == shares, f"{where}: two calls differ")
            for name in last:
                _require(gone[name] >= last[name] - 1, f"{where}: {name} loses less than at a lower sparsity")
            last = gone
        same = all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        _require(same, f"{allocation} changed the weights of layers of {what}")


def check_criterion(criterion: Criterion) -> None:
    """A criterion gives one finite score in float32 or wider for each entry, and changes nothing.

    On the convolution and linear layers of a small classifier, whose weights are float32, then bfloat16:

    - scores have the weight's shape, a floating-point type of at least 32 bits, and no NaN or infinity;
    - the weight and the statistics are not changed, and the same ones give the same scores;
    - `needs` is a tuple of statistics, and one that is missing raises `StatsError`;
    - `rounds` is at least 1, and the criterion can be hashed, as frozen dataclasses can.

    Whether larger means keep is the criterion's meaning, which no contract can test.

    Raises `AssertionError` if one of these does not hold.
    """
    _require(isinstance(criterion.needs, tuple), f"{criterion}: needs is not a tuple")
    _require(isinstance(criterion.rounds, int) and criterion.rounds >= 1, f"{criterion}: rounds is below 1")
    hash(criterion)
    model, batches = _classifier()
    targets = select(model, Where(also="*.weight")).targets
    collected = collect(model, criterion.needs, batches, F.cross_entropy, targets)
    for t in targets:
        stats = collected.stats[t.name]
        frozen = {stat: value.clone() for stat, value in stats.items()}
        for dtype in (torch.float32, torch.bfloat16):
            where = f"{criterion} on {t.name} in {dtype}"
            weight = t.matrix.to(dtype, copy=True)
            before = weight.clone()
            scores = criterion(weight, stats)
            _require(scores.shape == weight.shape, f"{where}: scores of shape {tuple(scores.shape)}")
            wide = scores.dtype in (torch.float32, torch.float64)
            _require(wide, f"{where}: scores are {scores.dtype}, where small differences are lost")
            _require(bool(torch.isfinite(scores).all()), f"{where}: scores are not finite")
            _require(torch.equal(weight, before), f"{where}: changed the weight")
            same = all(torch.equal(stats[stat], value) for stat, value in frozen.items())
            _require(same, f"{where}: changed a statistic")
            _require(torch.equal(criterion(weight, stats), scores), f"{where}: two calls differ")
        if criterion.needs:
            _check_missing_stats(criterion, t.matrix)


def _require(holds: bool, what: str) -> None:
    if not holds:  # not an assert statement, which `python -O` leaves out
        raise AssertionError(what)


def _fits(pattern: Pattern, shape: torch.Size) -> bool:
    try:
        pattern.check(shape, shape[1], "layer")
    except PatternError:
        return False
    return True


def _score_matrices(shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(shape.numel())
    normal = torch.randn(shape, generator=generator)
    yield "random", normal
    yield "bfloat16", normal.bfloat16()
    yield "float64", normal.double() * 1e-30
    yield "tied", torch.randint(-1, 2, shape, generator=generator).float()
    yield "constant", torch.full(shape, 0.5)
    yield "half -inf", torch.where(normal > 0, normal, -torch.inf)
    yield "all -inf", torch.full(shape, -torch.inf)


def _check_counts(pattern: Pattern, scores: Tensor, where: str) -> list[tuple[float, Tensor]]:
    """Check every sparsity alone; return the masks, in the order of their sparsities."""
    keeps = []
    before = scores.clone()
    entries = scores.numel()
    for s in _SPARSITIES:
        try:
            reached = pattern.reachable(scores.shape, s)
        except PatternError:
            _require(0 < s < 1, f"{where}: a sparsity of {s} cannot be reached")
            _require(_refuses(pattern, scores, s), f"{where} at {s}: reachable refuses, but keep does not")
            continue
        keep = pattern.keep(scores, s)
        _require(keep.dtype == torch.bool, f"{where} at {s}: the mask is {keep.dtype}")
        _require(keep.shape == scores.shape, f"{where} at {s}: the mask has shape {tuple(keep.shape)}")
        removed = int((~keep).count_nonzero())
        asked = pattern.unit * count(s, entries // pattern.unit)
        _require(removed == asked, f"{where} at {s}: removes {removed} of {entries} instead of {asked}")
        _require(removed == round(reached * entries), f"{where} at {s}: reachable promises {reached}")
        _require(torch.equal(scores, before), f"{where} at {s}: changes the scores")
        stored_otherwise = scores.t().contiguous().t()
        _require(torch.equal(pattern.keep(stored_otherwise, s), keep), f"{where} at {s}: two calls differ")
        keeps.append((s, keep))
    return keeps


def _refuses(pattern: Pattern, scores: Tensor, sparsity: float) -> bool:
    try:
        pattern.keep(scores, sparsity)
    except PatternError:
        return True
    return False


def _check_units(pattern: Pattern, shape: torch.Size) -> None:
    """Units stay whole; the best one is kept and the worst one dropped."""
    generator = torch.Generator().manual_seed(0)
    entries = torch.eye(shape.numel()).view(-1, *shape)
    unit_of = torch.stack([pattern.units(e).argmax() for e in entries]).view(shape)
    sizes = torch.bincount(unit_of.view(-1))
    _require(bool((sizes == pattern.unit).all()), f"{pattern}: units have sizes {sizes.unique().tolist()}")
    scores = torch.randn(shape, generator=generator)
    for s in _SPARSITIES:
        keep = pattern.keep(scores, s) if s in (0, 1) or not _refuses(pattern, scores, s) else None
        if keep is None:
            continue
        where = f"{pattern} on shape {tuple(shape)} at {s}"
        whole = all(keep[unit_of == u].unique().numel() == 1 for u in range(len(sizes)))
        _require(whole, f"{where}: a unit is kept in part")
        # With at least one unit for each row on both sides, every group that is compared has some of both.
        least = shape[0] * pattern.unit
        if int(keep.count_nonzero()) < least or int((~keep).count_nonzero()) < least:
            continue
        for u in torch.randperm(len(sizes), generator=generator)[:8].tolist():
            inside = unit_of == u
            raised = pattern.keep(torch.where(inside, 1e3, scores), s)
            _require(bool(raised[inside].all()), f"{where}: the unit with the largest score is removed")
            sunk = pattern.keep(torch.where(inside, -torch.inf, scores), s)
            _require(not bool(sunk[inside].any()), f"{where}: a unit of score -inf is kept")


def _layer_sets(pattern: Pattern) -> Iterator[tuple[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in map(torch.Size, _SHAPES) if _fits(pattern, s)][:6]
    _require(len(shapes) > 0, f"{pattern} fits none of the matrices {_SHAPES}")
    normal = [torch.randn(s, generator=generator) * 10.0 ** (i - 2) for i, s in enumerate(shapes)]
    yield "random weights", normal
    yield "one layer", normal[-1:]
    yield "tied weights", [w.sign() for w in normal]
    yield "constant weights", [torch.ones(s) for s in shapes]
    yield "half zero weights", [w.clamp(min=0) for w in normal]
    yield "one layer of zeros", [torch.zeros(shapes[0]), *normal[1:]]


def _layer(name: str, weight: Tensor, pattern: Pattern) -> Layer:
    def scores() -> Tensor:
        return weight.abs().masked_fill(weight == 0, -torch.inf)

    return Layer(name, weight.shape, weight.shape, pattern, lambda: weight, scores)


def _classifier() -> tuple[nn.Module, Sequence[tuple[Tensor, Tensor]]]:
    """A small network that learns nothing, with two batches of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    batches = []
    for n in (5, 3):
        x = torch.randn(n, 2, 5, 5, generator=generator)
        batches.append((x, torch.randint(0, 3, (n,), generator=generator)))
    return model, batches


def _check_missing_stats(criterion: Criterion, weight: Tensor) -> None:
    try:
        criterion(weight, {})
    except StatsError:
        return
    raise AssertionError(f"{criterion}: does not raise StatsError without {criterion.needs}")
