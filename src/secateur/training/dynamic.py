"""Dynamic sparse training: as many weights from the first step to the last, but not always the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.allocation import Allocation, erk
from secateur.core.errors import ScheduleError, SecateurError, StatsError
from secateur.core.names import Target, Where, select, unwrap
from secateur.core.topk import keep_largest
from secateur.criteria import Criterion, Random
from secateur.masks import Masks
from secateur.prune import refuse_class
from secateur.schedules import When, every
from secateur.training.attach import Optimizer
from secateur.training.choice import Choice
from secateur.training.draws import generator_at
from secateur.training.method import Method
from secateur.training.optimizer_state import forget_


@dataclass(frozen=True)
class Exchanged:
    """What a rule decided for one layer; boolean, in the shape of the weight.

    Attributes:
        keep: the new mask, with as many entries as the old.
        new: entries that start afresh: without a past in the optimizer, and from `values`.
        values: what they start from.
    """

    keep: Bool[Tensor, "*shape"]
    new: Bool[Tensor, "*shape"]
    values: Float[Tensor, "*shape"] | float


@runtime_checkable
class Rule(Protocol):
    """Which weights of a layer are dropped, and which are grown in their place."""

    takes_step: bool  # whether the weights are trained in the step at which masks change

    def __call__(
        self,
        weight: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        keep: Bool[Tensor, "*shape"],
        progress: float,
        generator: torch.Generator,
    ) -> Exchanged:
        """`progress`: the step over the last one at which masks may change; `generator`: on the CPU."""


@dataclass(frozen=True)
class RigL:
    r"""Drop the smallest weights, grow where the loss pulls hardest.

    Of the n weights of a layer the :math:`k = \lfloor f(t)\,n \rfloor` smallest go,
    :math:`f(t) = \frac{\alpha}{2} (1 + \cos \pi t / T_{end})`, and k of those that are not active then come
    to life, those with the largest :math:`|\partial L / \partial w|`. A weight that was dropped may be among
    them, and keeps its value; others start at 0 and without momentum. The step at which masks change trains
    no weight.

    Reference: Evci et al. 2020, Rigging the Lottery, algorithm 1.
    """

    fraction: float = 0.3
    takes_step = False

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)

    def __call__(
        self,
        weight: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        keep: Bool[Tensor, "*shape"],
        progress: float,
        generator: torch.Generator,
    ) -> Exchanged:
        active = int(keep.count_nonzero())
        swapped = int(self.fraction / 2 * (1 + math.cos(math.pi * progress)) * active)
        gone = keep.numel() - active
        kept = keep_largest(weight.abs().float().masked_fill(~keep, -torch.inf), gone + swapped)
        grown = keep_largest(gradient.abs().float().masked_fill(kept, torch.inf), gone)
        return Exchanged(grown, grown & ~keep, 0.0)


@dataclass(frozen=True)
class SET:
    r"""Drop the weights nearest to zero, grow at random.

    A fraction :math:`\zeta` of the positive weights of a layer, the smallest, and the same fraction of the
    negative ones, those nearest to zero, go; as many come to life among all that are not active then, evenly
    distributed within :math:`\pm 1/\sqrt{n_{in}}`.

    Reference: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse
    connectivity. Differs from the paper: new weights are drawn as torch draws those of its layers.
    """

    fraction: float = 0.3
    takes_step = True

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)

    def __call__(
        self,
        weight: Float[Tensor, "*shape"],
        gradient: Float[Tensor, "*shape"],
        keep: Bool[Tensor, "*shape"],
        progress: float,
        generator: torch.Generator,
    ) -> Exchanged:
        kept = keep.clone()
        for sign in (keep & (weight >= 0), keep & (weight < 0)):
            n = int(sign.count_nonzero())
            out = keep.numel() - n
            kept &= ~sign | keep_largest(
                weight.abs().float().masked_fill(~sign, -torch.inf), out + int(self.fraction * n)
            )
        noise = torch.rand(weight.shape, generator=generator).to(weight.device)
        grown = keep_largest(noise.masked_fill(kept, torch.inf), int((~keep).count_nonzero()))
        bound = (weight.shape[0] / max(1, weight.numel())) ** 0.5
        values = (2 * torch.rand(weight.shape, generator=generator).to(weight.device) - 1) * bound
        return Exchanged(grown, grown & ~kept, values.to(weight.dtype))


class Dynamic(Method):
    """Train with a fixed number of weights in each layer, exchanging some of them on the way.

        rigl = sc.Dynamic(model, sc.RigL(), 0.9, end=7500)
        with rigl.attach(optimizer):
            ...  # the loop, as it was

    Each layer keeps its count to the entry. Gradients are read right before the optimizer's step: summed over
    accumulated batches, averaged over ranks, unscaled, and dense.

    Args:
        model: any module, usually not trained yet.
        rule: `RigL()` or `SET()`.
        sparsity: fraction of the selected layers' weights that are off at any time.
        end: last step at which weights may be exchanged; three quarters of the training is usual.
        when: at which steps before that.
        allocation: how much from each layer.
        start: which weights are active at first: those that score highest by a criterion that needs no data.
        where: which layers; see `Where`.
        seed: of what is drawn at random; the same on all ranks.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        sparsity: float | None,
        *,
        end: int,
        when: When = every(100),  # noqa: B008, a frozen dataclass
        allocation: Allocation = erk,
        start: Criterion = Random(),  # noqa: B008, a frozen dataclass
        where: Where | None = None,
        seed: int = 0,
    ) -> None:
        refuse_class(rule)
        refuse_class(when)
        if end < 0:
            raise ScheduleError(f"end is the last step at which weights are exchanged; got {end}.")
        self.rule, self.when, self.last, self.seed = rule, when, end, seed
        selection = select(unwrap(model), where)
        choice = Choice(unwrap(model), selection.targets, start, None, allocation, None, None)
        settings = {"rule": repr(rule), "sparsity": repr(sparsity), "end": repr(end), "when": repr(when)}
        super().__init__(model, selection, settings | choice.settings(where) | {"seed": repr(seed)})
        self._first, _ = choice(sparsity)
        self._asked = Masks(self._first).sparsity

    def start(self) -> None:
        if not self.history:
            self._change(self._first, self._asked)

    def before_step(self, optimizer: Optimizer) -> bool:
        if not self.rule.takes_step and self._is_due(self.step + 1):
            self._exchange(optimizer, self.step + 1)
            return False
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.rule.takes_step and self._is_due(self.step):
            self._exchange(optimizer, self.step)
        else:
            self.live.write()

    def _is_due(self, step: int) -> bool:
        return 0 < step <= self.last and self.when(step)

    @torch.no_grad()
    def _exchange(self, optimizer: Optimizer, step: int) -> None:
        decided: dict[str, Exchanged] = {}
        for t in self.live.targets:
            gradient = t.weight.grad
            if gradient is None:
                raise StatsError(f"{t.name} has no gradient at step {step}: is it frozen, or out of use?")
            args = (t.weight.detach(), gradient, self.live[t.name], step / max(1, self.last))
            decided[t.name] = self.rule(*args, generator_at(self.seed, t.name, step))
        self._change({name: found.keep for name, found in decided.items()}, self._asked, step)
        for t in self.live.targets:
            _begin_anew(t, decided[t.name], optimizer)


def _begin_anew(target: Target, found: Exchanged, optimizer: Optimizer) -> None:
    weight = target.weight.detach()
    values = torch.as_tensor(found.values, dtype=weight.dtype, device=weight.device)
    weight.copy_(torch.where(found.new, values, weight))
    forget_(optimizer, target.weight, found.new)


def _check_fraction(rule: object, fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise SecateurError(f"{rule}: the fraction of weights to exchange is between 0 and 1.")
