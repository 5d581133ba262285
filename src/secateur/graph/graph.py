"""The dimensions of a model: traced, grouped, explained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import SelectionError
from secateur.core.names import unwrap
from secateur.graph import axes, draw, groups, oracle, siblings
from secateur.graph.axes import Axis, Dim
from secateur.graph.groups import Group
from secateur.graph.ints import Attr
from secateur.graph.oracle import Check
from secateur.graph.plan import Constraints, Sizes, Solution, common_step
from secateur.graph.rms import RmsForm, rms_form
from secateur.graph.rules.convolutions import KERNEL
from secateur.graph.trace import Traced, cached, results, run
from secateur.graph.types import Columns, Types

_STEPS = (1, 2, 4, 8, 16)  # granularities that are tried where the code divides a size


@dataclass(frozen=True)
class Cost:
    """What a model of some sizes costs: parameters, their bytes, multiply-accumulates, bytes of the cache.

    Attributes:
        params: distinct parameters.
        bytes: of distinct parameters as stored.
        macs: multiply-accumulates of one forward pass on the traced input.
        cache_bytes: of keys and values for one token of one sequence; 0 for models without a cache.
    """

    params: int
    bytes: int
    macs: int
    cache_bytes: int

    def memory(self, batch: int, context: int) -> float:
        """Bytes of the parameters and of the cache of `batch` sequences of `context` tokens."""
        return self.bytes + self.cache_bytes * batch * context


@dataclass(frozen=True)
class Frozen:
    """Dimensions that stay as they are for one reason, and the share of all parameters that lie in them."""

    reason: str
    share: float
    tensors: tuple[str, ...]


@dataclass(eq=False)
class Graph:
    """The typed dimensions of one model, from one forward pass.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> graph = sc.Graph.trace(model, torch.zeros(1, 4))
    >>> for group in graph.groups():
    ...     print(group)
    neurons of 0.weight (8)
    """

    model: nn.Module
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)
    traced: Traced = field(repr=False)
    all_groups: tuple[Group, ...] = field(repr=False)
    notes: tuple[str, ...]
    _clusters: tuple[tuple[Group, ...], ...] = field(repr=False)
    _constraints: Constraints = field(repr=False)
    _cache: list[tuple[list[Dim], int]] = field(repr=False)
    norms: Mapping[str, RmsForm] = field(repr=False)
    _by_name: dict[str, list[Dim]] = field(default_factory=dict, repr=False)

    @classmethod
    def trace(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
        """Trace `model` on example inputs, whose values do not matter where the code does not branch on them.

        Nothing is computed: operators run on tensors without data, so weights may be on the meta device,
        and no gradients are needed. Code that reads values is traced on the real tensors instead, which a
        note says. Dimensions of inputs and of outputs are frozen.

        Args:
            model: any module; wrappers of `torch.compile` and data parallelism are looked through.
            args: as for `model(...)`.
            kwargs: as for `model(...)`.
        """
        model = unwrap(model)
        traced = run(model, args, kwargs)
        return _finish(model, (args, kwargs), traced)

    @property
    def types(self) -> Types:
        """Types of all stored tensors."""
        return self.traced.types

    def groups(self, kind: str | None = None) -> tuple[Group, ...]:
        """Groups that can be cut, of one kind if given; `SelectionError` for a kind that the model lacks."""
        free = [g for g in self.all_groups if g.frozen is None]
        kinds = sorted({g.kind for g in free})
        if kind is not None and kind not in kinds:
            raise SelectionError(
                f"No group of kind {kind!r} can be cut; the model has {', '.join(kinds) or 'none'}."
            )
        return tuple(g for g in free if kind is None or g.kind == kind)

    def clusters(self) -> tuple[tuple[Group, ...], ...]:
        """Groups that one number in the code sizes together: each must keep the same share."""
        return self._clusters

    def dims(self, tensor: str) -> list[Dim]:
        """The dimensions of a stored tensor; `SelectionError` if there is none of this name."""
        if not self._by_name:
            self._by_name.update({s.name: s.type.dims for s in self.types.stored.values()})
        if tensor in self._by_name:
            return self._by_name[tensor]
        raise SelectionError(f"The model has no parameter or buffer {tensor!r}.")

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The traced shape of a stored tensor."""
        return tuple(axes.extent(d) for d in self.dims(tensor))

    @property
    def swapped(self) -> tuple[str, ...]:
        """Modules traced as another class, which reads its sizes from its weights."""
        return self.traced.swapped

    def labels(self, group: Group, tensor: str, dim: int) -> Tensor:
        """For each index of a dimension the unit of `group` that it belongs to, or -1. Int64 `[size]`."""
        return groups.labels(group.axis, self.dims(tensor)[dim])

    def cost(self, kept: Mapping[Group, int] | None = None) -> Cost:
        """Exact costs when the groups in `kept` have so many positions left, and all others all."""
        size = Sizes({g.axis: n for g, n in (kept or {}).items()})
        params = nbytes = 0
        for stored in self.types.stored.values():
            if stored.is_parameter:
                n = math.prod(size(d) for d in stored.type.dims)
                params += n
                nbytes += n * stored.tensor.element_size()
        macs = sum(math.prod(size(d) for d in product) for product in self.types.products)
        cache = sum(math.prod(size(d) for d in dims) * itemsize for dims, itemsize in self._cache)
        return Cost(params, nbytes, macs, cache)

    def solve(self, kept: Mapping[Group, int]) -> Solution:
        """Integers that follow when groups have so many positions left; see `Solution.problems`."""
        return self._constraints.solve({g.axis: n for g, n in kept.items()})

    def used_numbers(self) -> set[Attr]:
        """Integers of modules and configurations that decided a size or a branch of the traced code."""
        return self._constraints.attributes()

    def frozen(self) -> tuple[Frozen, ...]:
        """Why dimensions of parameters cannot be cut, by share of parameters held back, largest first.

        A dimension counts if nothing of it can be cut. Extents of kernels are not listed: there are no units
        along them.
        """
        total = sum(s.tensor.numel() for s in self.types.stored.values() if s.is_parameter)
        found: dict[str, dict[str, int]] = {}
        for stored in self.types.stored.values():
            if not stored.is_parameter:
                continue
            for dim in stored.type.dims:
                reason = axes.frozen_reason(dim)
                if axes.leaves(dim) and reason is not None and not reason.startswith(KERNEL):
                    found.setdefault(reason, {})[stored.name] = stored.tensor.numel()
        rows = [Frozen(r, sum(t.values()) / max(1, total), tuple(t)) for r, t in found.items()]
        return tuple(sorted(rows, key=lambda row: -row.share))

    def prunable_share(self) -> float:
        """Share of all parameters that lie in at least one group that can be cut."""
        total = inside = 0
        for stored in self.types.stored.values():
            if stored.is_parameter:
                total += stored.tensor.numel()
                free = any(axes.frozen_reason(d) is None for d in stored.type.dims)
                inside += stored.tensor.numel() if free else 0
        return inside / max(1, total)

    def verify(self, groups: Iterable[Group] | None = None, seed: int = 0) -> Check:
        """Prove by permutation: reordering the units of a group everywhere leaves the function unchanged.

        No unit is removed and the model is not touched. It holds for every group, exact or not, since no
        unit's place may matter; rounding apart. `Check.change` is what reordering one member alone does.

        Args:
            groups: to reorder, all that can be cut if None.
            seed: of the random orders.
        """
        chosen = self.groups() if groups is None else tuple(groups)
        generator = torch.Generator().manual_seed(seed)
        orders = {g.axis: torch.randperm(g.size, generator=generator) for g in chosen}
        plain = oracle.outputs(self.model, self.example)
        twin = oracle.permuted(self.model, self.types, orders)
        error = oracle.difference(plain, oracle.outputs(twin, self.example))
        return Check(error, self._half_permuted(orders, plain))

    def _half_permuted(self, orders: Mapping[Axis, Tensor], plain: list[Tensor]) -> float:
        """What happens if only some tensors are reordered: the power of the test."""
        some = Types(stored={k: s for i, (k, s) in enumerate(self.types.stored.items()) if i % 2})
        twin = oracle.permuted(self.model, some, orders)
        return oracle.difference(plain, oracle.outputs(twin, self.example))

    def masked_twin(self, kept: Mapping[Group, Sequence[int]]) -> nn.Module:
        """A copy of the model with the parameters of all units that are not kept at zero."""
        masks = {}
        for group, indices in kept.items():
            masks[group.axis] = torch.zeros(group.size, dtype=torch.bool)
            masks[group.axis][list(indices)] = True
        return oracle.masked(self.model, self.types, masks)

    def dot(self, kind: str | None = None) -> str:
        """A picture of the groups and the tensors that they tie together, as text for Graphviz.

        `dot -Tsvg` draws it. All groups of parameters are shown, frozen ones dashed, or one free kind.
        """
        return draw.dot(self.all_groups if kind is None else self.groups(kind), self.prunable_share())

    def explain(self, tensor: str) -> str:
        """What each dimension of a parameter or buffer is made of, and why it can or cannot be cut."""
        by_axis = {g.axis: g for g in self.all_groups}
        lines = [tensor]
        for i, dim in enumerate(self.dims(tensor)):
            lines.append(f"  dim {i}, size {axes.extent(dim)}: {_formula(dim, by_axis)}")
            for leaf in axes.leaves(dim):
                group = by_axis.get(leaf)
                if leaf.frozen is not None:
                    lines.append(f"    {leaf.size}: frozen, {leaf.frozen}")
                elif group is not None:
                    exact = "exact" if group.exact else f"not exact: {group.inexact[0]}"
                    lines.append(f"    {group.name}: {len(group.members)} places, {exact}")
        return "\n".join(lines)

    def __str__(self) -> str:
        free = self.groups()
        kinds: dict[str, int] = {}
        for g in free:
            kinds[g.kind] = kinds.get(g.kind, 0) + 1
        what = ", ".join(f"{n} of {kind}" for kind, n in kinds.items()) or "none"
        lines = [f"{len(free)} groups ({what}); {self.prunable_share():.1%} of the parameters lie in one."]
        lines += [f"Frozen, {row.share:.1%} of the parameters: {row.reason}" for row in self.frozen()[:5]]
        return "\n".join((*lines, *self.notes))


def _formula(dim: Dim, by_axis: Mapping[Axis, Group]) -> str:
    """A dimension as products and sums of named axes."""
    out = []
    for atom in axes.atoms(dim):
        if atom.terms is not None:
            out.append("(" + " + ".join(_formula(t, by_axis) for t in axes.terms_of(atom)) + ")")
        else:
            group = by_axis.get(atom)
            out.append(f"{atom.size} {group.kind}" if group and group.frozen is None else str(atom.size))
    return " x ".join(out) or "1"


def _finish(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], traced: Traced) -> Graph:
    types = traced.types
    notes = [traced.note] if traced.note else []
    copied = siblings.type_by_siblings(model, types)
    if copied:
        notes.append(
            f"Not met by the trace and typed like their siblings: {', '.join(copied[:5])}"
            + (f" and {len(copied) - 5} more." if len(copied) > 5 else ".")
        )
    cache = _freeze_outputs(traced)
    unmet = []
    for stored in types.stored.values():
        if id(stored.tensor) not in types.used and stored.name:
            unmet += [stored.name] if stored.is_parameter else []
            for dim in stored.type.dims:
                axes.freeze(dim, "the traced forward pass never used it")
        for dim in stored.type.dims:
            for leaf in groups.occurs_twice(dim):
                axes.freeze((leaf,), "it stands twice in one dimension")
    if unmet:
        notes.append(
            f"Never used by the traced forward pass, left whole: {', '.join(unmet[:5])}"
            + (f" and {len(unmet) - 5} more." if len(unmet) > 5 else ".")
        )
    ledger = traced.ledger
    constraints = Constraints(
        traced.ties, ledger.guards.values(), ledger.numbers, ledger.values, types.aligned, traced.calls
    )
    norms = _rms_norms(model, types)
    found = groups.find_groups(types, norms)
    steps = _feasible(found, constraints)
    final = tuple(
        replace(g, frozen=g.axis.frozen, step=step, least=least)
        for g in found
        for step, least in (steps.get(g.axis, (1, 1)),)
    )
    by_axis = {g.axis: g for g in final}
    clusters = [
        tuple(by_axis[a] for a in cluster if a in by_axis and a.frozen is None)
        for cluster in constraints.clusters()
    ]
    clusters = [c for c in clusters if len(c) > 1]
    graph = Graph(model, example, traced, final, tuple(notes), tuple(clusters), constraints, cache, norms)
    if final:
        final[0].home.graph = graph
    return graph


def _rms_norms(model: nn.Module, types: Types) -> dict[str, RmsForm]:
    """Norms whose weight can take up a change of the mean of squares."""
    found = {}
    for name in {event.module for event in types.inexact} & set(types.names.values()):
        form = rms_form(model.get_submodule(name))
        if form is not None:
            found[name] = form
    return found


def _freeze_outputs(traced: Traced) -> list[tuple[list[Dim], int]]:
    """Freeze what the model returns; the dimensions of its cache of keys and values are returned instead."""
    for t in results(traced.output):
        for dim in traced.types.dims(t):
            axes.freeze(dim, "a dimension of the model's output")
        value = traced.types.of(t).value
        for dim in value.dims if isinstance(value, Columns) else (value,) if value is not None else ():
            axes.freeze(dim, "its positions are numbers in the model's output")
    return [(traced.types.dims(t)[1::2], t.element_size()) for t in cached(traced.output)]


def _feasible(found: list[Group], constraints: Constraints) -> dict[Axis, tuple[int, int]]:
    """Try each cluster of axes; freeze those whose sizes the code cannot follow. Step and least of others."""
    known = {g.axis for g in found}
    sets = [{a for a in c if a.frozen is None} for c in constraints.clusters()]
    together = [s & known for s in sets if s & known]
    alone = known - {a for s in together for a in s}
    steps: dict[Axis, tuple[int, int]] = {}
    pending = [[a] for a in alone if a.frozen is None] + [list(s) for s in together]
    while pending:
        cluster = [a for a in pending.pop() if a.frozen is None]
        if not cluster:
            continue
        step, least, why = _step(cluster, constraints)
        if step:
            shares = common_step(b.size for b in cluster)
            steps |= {a: (step * (a.size // shares), least * (a.size // shares)) for a in cluster}
        elif len(cluster) > 1 and len({a.size for a in cluster}) > 1:
            # One attribute gives products of different axes: perhaps some can be cut alone.
            pending += [[a] for a in cluster]
        else:
            for a in cluster:
                axes.freeze((a,), why)
    return steps


def _step(cluster: list[Axis], constraints: Constraints) -> tuple[int, int, str]:
    """How finely a cluster can be cut: step and least kept, in equal shares; 0 with a reason if it cannot."""
    shares = common_step(a.size for a in cluster)
    why = "only one share of it could be kept"

    def refusal(n: int) -> str:
        found = constraints.solve({a: a.size // shares * n for a in cluster}).problems
        return found[0].text if found else ""

    for step in _STEPS:
        if step >= shares:
            break
        # Several counts, since a size that is divided by two may be odd at one of them.
        tried = [n for n in (shares - step, shares - 2 * step, shares // 2 // step * step) if 0 < n < shares]
        reasons = [r for n in dict.fromkeys(tried) if (r := refusal(n))]
        if not reasons:
            least = next(
                (n for n in (step, 2 * step, 4 * step) if n >= min(tried) or not refusal(n)), min(tried)
            )
            return step, least, ""
        why = reasons[0]
    return 0, 0, why
