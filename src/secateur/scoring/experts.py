"""Scores of the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.collect import Loss
from secateur.core.errors import StatsError
from secateur.scoring.base import Group, Labels, Scores, finished, places
from secateur.scoring.taps import data, measuring


@dataclass(frozen=True)
class ExpertOutput:
    r"""How much an expert says to the tokens that are sent to it.

    $$ s_e = \frac{1}{|T_e|} \sum_{t \in T_e} \lVert g_{te} E_e(x_t) \rVert_2 $$

    over the tokens $T_e$ routed to the expert, with the router's weight $g$. An expert that gets no token
    scores 0, with a note. Needs batches, without targets; no gradients. In the units of the layer's output.

    For stacks of experts held as 3-D parameters by a module that is called with the tokens `[T, H]`, the
    experts chosen for each (integers `[T, k]`) and their weights `[T, k]`, as those of transformers are. The
    module is called once more with each choice in a row of its own; that the rows of a token add up to its
    output is checked in every call.

    Raises `StatsError` for experts held in any other way.

    Source: Lasby et al. 2025, REAP the experts: router-weighted expert activation pruning.
    """

    def __call__(
        self,
        model: nn.Module,
        groups: Sequence[Any],
        labels: Labels,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ) -> dict[Any, Scores]:
        meters = {g: _Meter(g, *_stack(model, g, labels)) for g in groups}
        handles = []
        try:
            for meter in meters.values():
                handles.append(meter.module.register_forward_hook(meter.hear, with_kwargs=True))
            with torch.no_grad(), measuring(model):
                for batch in data(model, batches, self):
                    batch.forward(model)
        finally:
            for handle in handles:
                handle.remove()
        return {g: meter.scores() for g, meter in meters.items()}


def _stack(model: nn.Module, group: Group, labels: Labels) -> tuple[nn.Module, Tensor]:
    """The module that holds a group's experts as stacks, and the unit of each expert."""
    held = [p for p in places(model, group, labels) if p.weight.dim() == 3 and p.dim == 0]
    modules = {id(p.target.module): p for p in held}
    if len(modules) != 1:
        raise _unmeasurable(group, "its experts are not stacks of parameters in one module")
    place = next(iter(modules.values()))
    return place.target.module, place.labels


def _unmeasurable(group: Group, why: str) -> StatsError:
    return StatsError(
        f"ExpertOutput cannot be measured for {group.name}: {why}. Use GroupScore(Taylor()) or "
        "JointTaylor() instead."
    )


@dataclass
class _Meter:
    """Listens to one module of experts."""

    group: Group
    module: nn.Module
    labels: Tensor
    totals: Tensor = field(init=False)
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.totals = torch.zeros(self.group.size, dtype=torch.float64, device=self.labels.device)
        self.counts = torch.zeros_like(self.totals)

    def hear(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Call the module again with a row for each choice of each token."""
        values = [*args, *kwargs.values()]
        found = _arguments(values, output)
        if found is None:
            raise _unmeasurable(
                self.group,
                f"{type(module).__name__} is not called with tokens [T, H], choices and weights [T, k]",
            )
        x, chosen, weights = (values[i] for i in found)
        tokens, k = chosen.shape
        each = (x.repeat_interleave(k, dim=0), chosen.reshape(-1, 1), weights.reshape(-1, 1))
        for i, value in zip(found, each, strict=True):
            values[i] = value
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        # Not through __call__, which would come back here.
        rows = module.forward(*values[: len(args)], **named).double()
        whole = output.double()
        error = (rows.reshape(tokens, k, -1).sum(dim=1) - whole).norm()
        if not error <= (1e-4 if output.element_size() >= 4 else 5e-2) * whole.norm():
            raise _unmeasurable(self.group, "its output is not the sum of its experts' weighted outputs")
        self._add(rows.norm(dim=1), chosen.reshape(-1))

    def _add(self, norms: Tensor, chosen: Tensor) -> None:
        inside = (chosen >= 0) & (chosen < len(self.labels))  # some routers mark dropped tokens by one more
        units = self.labels[chosen[inside]]
        kept = units >= 0
        self.totals.index_add_(0, units[kept], norms[inside][kept])
        self.counts.index_add_(0, units[kept], torch.ones_like(norms[inside][kept]))

    def scores(self) -> Scores:
        """Means, and which experts were never chosen."""
        if not bool(self.counts.any()):
            raise _unmeasurable(self.group, "its module was never called, or no token was routed")
        idle = (self.counts == 0).nonzero().flatten().tolist()
        note = f"No token was routed to {len(idle)} of {self.group.size} experts, which score 0: {idle}."
        return finished(self.group, self.totals / self.counts.clamp(min=1), [note] if idle else [])


def _arguments(values: list[Any], output: Any) -> tuple[int, int, int] | None:
    """Positions of tokens, choices and weights among the arguments of a module of experts."""
    matrices = [(i, v) for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim() == 2]
    chosen = [i for i, v in matrices if not v.is_floating_point() and v.dtype != torch.bool]
    if len(chosen) != 1 or len(matrices) != 3 or not isinstance(output, Tensor):
        return None
    shape = values[chosen[0]].shape
    rest = [i for i, _ in matrices if i != chosen[0]]
    weights = [i for i in rest if values[i].shape == shape]
    tokens = [i for i in rest if values[i].shape == output.shape]
    if len(tokens) == 2:  # as many experts for a token as it has entries: tokens come first
        tokens, weights = rest[:1], rest[1:]
    found = len(weights) == 1 and len(tokens) == 1 and shape[0] == output.shape[0]
    return (tokens[0], chosen[0], weights[0]) if found else None
