"""Which units of which groups stay: previewed, applied, saved, replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.callsites import Edit, in_force
from secateur.core.errors import ArtifactError, SurgeryError
from secateur.core.files import write_text
from secateur.graph import Cost, Graph, Group, axes
from secateur.graph.ints import Attr
from secateur.graph.plan import Sizes, Solution
from secateur.printing import printed
from secateur.surgery.apply import Applied, carry_out
from secateur.surgery.config import config_edits
from secateur.surgery.cuts import Attribute, CutAxis, Cuts, node_of
from secateur.surgery.journal import Journal
from secateur.surgery.norms import rescaled_norms
from secateur.surgery.repairs import edits_of

Kept = Sequence[int] | Tensor


class Surgery(Mapping[Group, tuple[int, ...]]):
    """Group -> sorted indices of the units that are kept. Immutable.

    Args:
        kept: indices, or a boolean mask, for each group that loses units; all of one graph.

    Raises:
        SurgeryError: a group of another graph or a frozen one, indices outside it, or none left.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> graph = sc.Graph.trace(model, torch.zeros(1, 4))
    >>> (neurons,) = graph.groups("neurons")
    >>> applied = sc.Surgery({neurons: [0, 3, 5]}).apply_(model)
    >>> model[0].weight.shape, model[2].weight.shape
    (torch.Size([3, 4]), torch.Size([2, 3]))
    >>> applied.undo()
    >>> model[0].weight.shape
    torch.Size([8, 4])
    """

    def __init__(self, kept: Mapping[Group, Kept]) -> None:
        if not kept:
            raise SurgeryError("A surgery needs at least one group, from Graph.groups().")
        self.graph: Graph = next(iter(kept)).home.graph
        self._kept = {g: _indices(g, k, self.graph) for g, k in kept.items()}

    def __getitem__(self, group: Group) -> tuple[int, ...]:
        return self._kept[group]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"Surgery({len(self)} groups, {sum(g.size - len(k) for g, k in self.items())} units removed)"

    def plan(self) -> Plan:
        """What `apply_` would do, without doing it; `SurgeryError` where the model's code cannot follow."""
        return make_plan(self)

    def apply_(
        self, model: nn.Module | None = None, optimizer: Optimizer | Iterable[Optimizer] = ()
    ) -> Applied:
        """Carry the surgery out in place: wholly, or, if anything fails, not at all.

        Args:
            model: the traced one if None, else one of the same structure, a copy for instance.
            optimizer: one or several, whose parameters and state follow.

        Returns:
            What was done; its `undo()` takes it back.
        """
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        return carry_out(self.graph.model if model is None else model, self.plan().cuts, optimizers)


def _indices(group: Group, kept: Kept, graph: Graph) -> tuple[int, ...]:
    if group.home.graph is not graph:
        raise SurgeryError(
            f"{group} is a group of another graph than the first: trace once, and use one graph."
        )
    if group.frozen is not None:
        raise SurgeryError(f"{group} cannot be cut: {group.frozen}.")
    if isinstance(kept, Tensor):
        kept = kept.nonzero().flatten().tolist() if kept.dtype == torch.bool else kept.tolist()
    indices = tuple(sorted({int(i) for i in kept}))
    if not indices:
        raise SurgeryError(f"Nothing of {group} would be left: keep at least one unit, or drop the layer.")
    if len(indices) != len(kept) or indices[0] < 0 or indices[-1] >= group.size:
        raise SurgeryError(f"The kept indices of {group} must be different ones from 0 to {group.size - 1}.")
    return indices


@dataclass(frozen=True)
class Plan:
    """A surgery worked out for every tensor, number and call that follows.

    Attributes:
        surgery: what was asked.
        cuts: as data; `Plan.save` writes them.
        before: costs as traced.
        after: costs afterwards, exact.
        notes: removals that are not exact, and what else a reader must know.
    """

    surgery: Surgery
    cuts: Cuts
    before: Cost
    after: Cost
    notes: tuple[str, ...] = field(default=())

    def keep(self, tensor: str, dim: int) -> Tensor:
        """What survives of a dimension of a parameter or buffer. Bool `[size before]`."""
        if tensor in self.cuts.tensors:
            return self.cuts.mask(tensor, dim)
        size = self.surgery.graph.shape(tensor)[dim]
        return torch.ones(size, dtype=torch.bool)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cuts as JSON, for `replay_` on a freshly built model."""
        save_cuts([self.cuts], path)

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_footer=True)
        table.add_column("group", overflow="fold", footer=f"{len(self.surgery)} groups")
        for column in ("units", "kept"):
            table.add_column(column, justify="right")
        table.add_column("places", justify="right")
        table.add_column("exact")
        for group, kept in self.surgery.items():
            table.add_row(
                group.name,
                str(group.size),
                str(len(kept)),
                str(len(group.members)),
                "yes" if group.exact else f"no: {group.inexact[0]}",
            )
        share = self.after.params / max(1, self.before.params), self.after.macs / max(1, self.before.macs)
        table.caption = (
            f"{share[0]:.1%} of the parameters and {share[1]:.1%} of the multiply-accumulates stay"
        )
        return table

    def __str__(self) -> str:
        return printed(self.__rich__()) + "".join(f"  {note}\n" for note in self.notes)


def make_plan(surgery: Surgery) -> Plan:
    """Work out what a surgery does; `SurgeryError` where the code cannot follow."""
    graph = surgery.graph
    counts = {g: len(k) for g, k in surgery.items()}
    solution = graph.solve(counts)
    if solution.problems:
        raise SurgeryError(_refusal(solution, graph))
    cut = {g: k for g, k in surgery.items() if len(k) < g.size}
    names = {g.axis: f"a{i}" for i, g in enumerate(cut)}
    tensors = {}
    for stored in graph.types.stored.values():
        nodes = tuple(node_of(d, names) for d in stored.type.dims)
        if stored.name and any(not isinstance(n, int) for n in nodes):
            tensors[stored.name] = (tuple(stored.tensor.shape), nodes)
    cut_axes = {names[g.axis]: CutAxis(g.name, g.kind, g.size, k) for g, k in cut.items()}
    attributes = tuple(_attribute(graph, a, n) for a, n in solution.attrs.items())
    scales, floats, notes = rescaled_norms(graph, cut)
    defined = {type(m).__module__ for m in graph.model.modules()}
    size = Sizes({g.axis: n for g, n in counts.items()})
    kept_scales = [s for s in graph.types.scales if size(s.dim) != axes.extent(s.dim)]
    wanted = (*edits_of(solution.repairs), *(s.edit for s in kept_scales))
    edits = list(dict.fromkeys((*wanted, *in_force(defined))))
    fields, misfit = config_edits(graph, size, tensors, (*attributes, *floats))
    if misfit is not None and cut:
        notes.append(f"config.json cannot express the result, since {misfit}: sc.load rebuilds it instead.")
    cuts = Cuts(
        cut_axes,
        tensors,
        (*attributes, *floats, *fields),
        scales,
        graph.swapped,
        tuple(e.to_dict() for e in edits),
        misfit is None and not edits and not graph.swapped and bool(fields or attributes),
        tuple(dict.fromkeys((s.module, s.edit.kept_in, s.scale) for s in kept_scales)),
    )
    notes += _notes(cut, solution, dict.fromkeys(s.edit for s in kept_scales))
    return Plan(surgery, cuts, graph.cost(), graph.cost(counts), tuple(notes))


def _attribute(graph: Graph, attr: Attr, new: int) -> Attribute:
    owner = graph.traced.owners[attr.owner]
    return Attribute(owner.module, owner.steps, attr.name, attr.index, graph.traced.ledger.values[attr], new)


def _refusal(solution: Solution, graph: Graph) -> str:
    problem = solution.problems[0]
    by_axis = {g.axis: g for g in graph.all_groups}
    concerned = [str(by_axis[a]) for a in problem.axes if a in by_axis and by_axis[a].frozen is None]
    more = f" (and {len(solution.problems) - 1} more such places)" if len(solution.problems) > 1 else ""
    return (
        f"The model's code cannot follow these sizes: {problem.text}{more}. It concerns "
        f"{', '.join(concerned[:4]) or 'no group that can be cut'}: keep equal shares of groups of one "
        "cluster, see Graph.clusters(), or leave them whole."
    )


def _notes(cut: Mapping[Group, tuple[int, ...]], solution: Solution, scales: Iterable[Edit]) -> Iterator[str]:
    for group in cut:
        if not group.exact:
            yield f"{group}: removing is not the same as zeroing, since it is {group.inexact[0]}."
    for repair in solution.repairs:
        where = f"{repair.call} at {repair.place}"
        yield f"{where} holds a size that changes: it is read from the tensor instead."
    for edit in scales:
        yield (
            f"{edit.module}.{edit.qualname} leaves the scale of attention to the size of a head, which "
            "changes: the trained scale is given instead."
        )


def replay_(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], optimizer: Iterable[Optimizer] = ()
) -> Applied:
    """Do a saved surgery again on a freshly built model of the same structure, without tracing it.

    Args:
        model: with the shapes from before the surgery; it may be on the meta device.
        source: a file that `Plan.save` wrote, or its content.
        optimizer: optimizers whose parameters and state follow.

    Raises:
        ArtifactError: the file is damaged. SurgeryError: it is for another model.
    """
    cuts = read_cuts(source)
    done: list[Applied] = []

    def undo() -> None:
        for applied in reversed(done):
            applied.undo()

    journal = Journal()
    journal.done(undo)
    try:
        for one in cuts:
            done.append(carry_out(model, one, optimizer))
        return Applied(cuts[-1], journal)
    except BaseException:
        journal.undo()
        raise


def save_cuts(cuts: Sequence[Cuts], path: str | os.PathLike[str]) -> None:
    """Write what one or several surgeries, one after the other, leave of a model, as JSON."""
    write_text(path, json.dumps(as_data(cuts)) + "\n")


def as_data(cuts: Sequence[Cuts]) -> dict[str, Any]:
    """The content of a surgery file."""
    return {"format": 1, "cuts": [one.to_dict() for one in cuts]}


def read_cuts(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[Cuts]:
    """Surgeries from a file or its content; `ArtifactError` if it is none."""
    data: Any = source
    if not isinstance(source, Mapping):
        try:
            data = json.loads(Path(source).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{source} cannot be read as a surgery: {error}.") from None
    if not isinstance(data, Mapping) or data.get("format") != 1 or not isinstance(data.get("cuts"), list):
        raise ArtifactError(f"{source if data is not source else 'This'} is no surgery of a known format.")
    if not data["cuts"]:
        raise ArtifactError("The surgery is empty.")
    return [Cuts.from_dict(one) for one in data["cuts"]]
