"""Movement pruning: what goes is what training moves towards zero, not what is small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocation import Allocation, Layer, at_least, global_, uniform
from secateur.core.errors import MaskError, SecateurError, StatsError
from secateur.core.names import Target, Where, select, unwrap
from secateur.core.topk import count, keep_largest
from secateur.patterns import Block, Pattern, Unstructured, on_the_way
from secateur.prune import check_targets, masks_of, refuse_class
from secateur.schedules import Schedule, When, check_schedule, every, is_due
from secateur.training.attach import Optimizer
from secateur.training.method import Method
from secateur.training.shadow import Scores, Shadow


@dataclass(frozen=True)
class Soft:
    r"""Masks by one threshold on the scores of all layers, as soft movement pruning has them.

    A penalty pulls scores down: the mean of :math:`\sigma(S)` over each matrix, averaged over matrices, times
    :math:`\lambda_t = \lambda\, s_t / s_f`, which rises with the schedule. Only what training wants keeps a
    high score, and how much stays of each layer is an outcome.

    Without a `threshold` it is, at every change, the one below which the schedule's share of all scores lies:
    the sparsity is what was asked, in training too. With one, as in the paper, scores stay where
    :math:`\sigma(S) > \tau_t = \tau\, s_t / s_f`; how much that removes is an outcome as well, and at the end
    of the schedule the scores are ranked for the asked sparsity. The paper has :math:`\tau = 0.1` and some
    fifty thousand steps: a shorter training brings fewer scores below, and what it lacks goes at once in the
    end, which costs accuracy. The report says how much that was.

    Args:
        threshold: a fixed one, or None.
        strength: :math:`\lambda`.
        floor: the fraction of each matrix that stays in any case.
    """

    threshold: float | None = None
    strength: float = 400.0
    floor: float = 0.005

    def __post_init__(self) -> None:
        fits = self.threshold is None or 0 < self.threshold < 1
        if not (fits and 0 <= self.strength < float("inf") and 0 <= self.floor <= 1):
            raise SecateurError(
                f"{self}: the threshold lies between 0 and 1, strength is at least 0, floor a fraction."
            )


class Movement(Method):
    r"""Learn which weights to keep, by scores that follow :math:`-\sum_t w\,\partial L/\partial w`.

        movement = sc.Movement(model, sc.cubic(0, 0.9, begin=200, end=1600))
        with movement.attach(optimizer):
            ...  # the loop, as it was

    Every weight has a score, zero at first. The model runs on the weights whose scores are highest; the
    gradient goes straight through the choice, so that the score of each weight, masked or not, gets
    :math:`w\,\partial L/\partial w`, and the weights that are masked get none. Masked weights may come back
    until the end of the schedule; then the masks stay.

    Gradients must be dense, as `attach` reads them: accumulated, reduced and unscaled. Where their norm is
    clipped, it is that of the dense gradient. Memory: four more copies of the pruned weights.

    Args:
        model: any module, usually pretrained.
        schedule: step -> sparsity.
        when: steps since `schedule.begin` -> whether masks change. The paper changes them at every step.
        soft: masks by a threshold for all layers, with a penalty, instead of a fixed number in each layer.
        rate: learning rate of an Adam for the scores, which follows the schedule of the optimizer's. None:
            for hard movement the scores are plain sums of :math:`-w\,\partial L/\partial w`, weighted by the
            schedule, as the paper defines them; its authors' code has Adam with 1e-2, which needs many more
            steps, since each weight's signal and noise weigh the same. For a soft schedule 1e-2.
        pattern: which entries may survive; a block has one score.
        allocation: how much from each layer where scores are ranked. None: `uniform`; for a soft schedule
            `global_` with the floor of `soft`.
        where: which layers; see `Where`.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input.

    Reference: Sanh et al. 2020, Movement pruning: adaptive sparsity by fine-tuning; Lagunas et al. 2021 for
    blocks.
    """

    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        when: When = every(10),  # noqa: B008, a frozen dataclass
        soft: Soft | None = None,
        rate: float | None = None,
        pattern: Pattern | None = None,
        allocation: Allocation | None = None,
        where: Where | None = None,
    ) -> None:
        for setting in (schedule, when, soft, pattern):
            refuse_class(setting)
        check_schedule(schedule)
        if rate is None and soft is not None:
            rate = 1e-2
        if rate is not None and not rate > 0:
            raise SecateurError(f"The learning rate of the scores is above 0; got {rate}.")
        self.schedule, self.when, self.soft = schedule, when, soft
        self.pattern = pattern or Unstructured()
        self.allocation = allocation or (uniform if soft is None else at_least(global_, soft.floor))
        selection = select(unwrap(model), where)
        check_targets(selection.targets, self.pattern)
        settings = {
            "schedule": repr(schedule),
            "when": repr(when),
            "movement": "hard" if soft is None else repr(soft),
            "rate": "sums" if rate is None else repr(rate),
            "pattern": repr(self.pattern),
            "allocation": getattr(self.allocation, "__name__", repr(self.allocation)),
            "where": repr(where or Where()),
        }
        super().__init__(model, selection, settings)
        self._shadow = Shadow(selection.targets)
        self._scores = Scores({t.name: self._none(t) for t in selection.targets}, rate)
        self._gradients: dict[str, Tensor] = {}
        self._by_scores(schedule(schedule.end), last=True)  # what cannot be had fails before training

    @property
    def end(self) -> int:
        return self.schedule.end

    def start(self) -> None:
        self._shadow.begin()
        if self.step == 0 and not self.history and is_due(self.schedule, self.when, 0):
            self._update()

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        if self.step >= self.end:
            return True
        for t in self.live.targets:
            if t.weight.grad is None:
                raise StatsError(
                    f"{t.name} has no gradient at step {self.step + 1}: is it frozen, or out of use?"
                )
            flow = t.layout.matrix(t.weight.grad.float() * self._shadow.dense[t.name])
            self._gradients[t.name] = self.pattern.units(flow)
        self.live.write_gradients()
        self._shadow.show()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.step > self.end:
            self.live.write()
            return
        self._shadow.take()
        self._scores.step(self._penalised(), optimizer)
        if is_due(self.schedule, self.when, self.step):
            self._update()
        else:
            self.live.write()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.step < self.end:
            state["dense"] = self._shadow.state_dict()
            state["scores"] = self._scores.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.step < self.end:
            if "dense" not in state or "scores" not in state:
                raise MaskError("The state lacks the dense weights and scores of movement pruning.")
            self._shadow.load(state["dense"])
            self._scores.load_state_dict(state["scores"])

    def scores(self) -> dict[str, Tensor]:
        """The scores of each layer's units (entries or blocks), by parameter name."""
        return {t.name: self._scores[t.name].clone() for t in self.live.targets}

    def _none(self, target: Target) -> Tensor:
        units = target.shape.numel() // self.pattern.unit
        return torch.zeros(units, dtype=torch.float32, device=target.weight.device)

    def _share(self) -> float:
        """How far the schedule is on its way to the final sparsity."""
        final = self.schedule(self.end)
        return self.schedule(self.step) / final if final else 1.0

    def _penalised(self) -> dict[str, Tensor]:
        if self.soft is None:
            return self._gradients
        strength = self.soft.strength * self._share() / len(self.live.targets)
        for name, gradient in self._gradients.items():
            s = self._scores[name].sigmoid()
            gradient.add_(s * (1 - s), alpha=strength / s.numel())
        return self._gradients

    def _update(self) -> None:
        last, asked = self.step >= self.end, self.schedule(self.step)
        fixed = self.soft is not None and self.soft.threshold is not None
        if fixed and last:
            had = 1 - sum(int(m.count_nonzero()) for m in self._by_threshold().values()) / sum(
                t.weight.numel() for t in self.live.targets
            )
            self._notes[
                f"The threshold would have removed {had:.2%}; the scores were ranked for {asked:.2%}."
            ] = None
        keep = self._by_threshold() if fixed and not last else self._by_scores(asked, last)
        self._change(keep, asked)

    def _by_scores(self, sparsity: float, last: bool) -> dict[str, Tensor]:
        pattern = on_the_way(self.pattern, last)
        layers = [self._layer(t, pattern) for t in self.live.targets]
        keep, _ = masks_of(layers, pattern, self.allocation, sparsity)
        return {t.name: t.layout.restore(keep[t.name], t.weight.shape) for t in self.live.targets}

    def _by_threshold(self) -> dict[str, Tensor]:
        assert self.soft is not None and self.soft.threshold is not None
        threshold = self.soft.threshold * self._share()
        keep = {}
        for t in self.live.targets:
            scores = self._scores[t.name].sigmoid()
            kept = scores > threshold
            most = count(1 - self.soft.floor, scores.numel())  # that may go
            if scores.numel() - int(kept.count_nonzero()) > most:
                kept = keep_largest(scores, most)
            keep[t.name] = t.layout.restore(_spread(self.pattern, kept, t.shape), t.weight.shape)
        return keep

    def _layer(self, target: Target, pattern: Pattern) -> Layer:
        return Layer(
            target.name,
            target.shape,
            target.weight.shape,
            pattern,
            lambda: target.layout.matrix(self._shadow.dense[target.name]).float(),
            lambda: _spread(self.pattern, self._scores[target.name], target.shape),
        )


def _spread(pattern: Pattern, units: Tensor, shape: torch.Size) -> Tensor:
    """One value for each unit of a pattern, on all of the unit's entries: `[out, in]`."""
    if isinstance(pattern, Block):
        out, width = shape
        tiles = units.view(out // pattern.rows, 1, width // pattern.columns, 1)
        return tiles.expand(-1, pattern.rows, -1, pattern.columns).reshape(out, width)
    return units.view(shape)
