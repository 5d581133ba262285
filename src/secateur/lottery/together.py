"""Several networks of one architecture as one batched model: a step of all of them is one step of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.core.errors import ScheduleError, SecateurError
from secateur.lottery.trial import State, Trial, load_optimizer, optimizer_tensors, replay
from secateur.masks import Masks

_DROPOUT = nn.modules.dropout._DropoutNd
_NORM = nn.modules.batchnorm._NormBase


def batchable(model: nn.Module) -> bool:
    """Whether a forward pass changes nothing and draws nothing, and no parameter is tied or frozen."""
    modules = list(model.modules())
    if any(isinstance(m, nn.RReLU) or (isinstance(m, _DROPOUT) and m.p > 0) for m in modules):
        return False
    if any(isinstance(m, _NORM) and m.track_running_stats for m in modules):
        return False
    parameters = list(model.named_parameters(remove_duplicate=False))
    if len({id(p) for _, p in parameters}) < len(parameters):
        return False
    return all(p.requires_grad for _, p in parameters)


class Together:
    """The networks of several trials, stacked, with one optimizer and their masks.

    An optimizer that treats every entry of a parameter by itself does to a stack what it does to each.

    Raises `SecateurError` if the networks differ in architecture or in where they start.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        total: int,
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any],
    ) -> None:
        self.trials = list(trials)
        first = self.trials[0]
        shapes = [{n: p.shape for n, p in t.model.named_parameters()} for t in self.trials]
        if any(s != shapes[0] for s in shapes) or len({_start(t) for t in self.trials}) > 1:
            raise SecateurError(
                "Networks that are trained together have one architecture and start at one step."
            )
        self.total, self.start = total, first.start
        if self.start >= total:
            raise ScheduleError(
                f"Training of {total} steps cannot start at step {self.start}: rewind to one before its end."
            )
        self._names = list(shapes[0])
        parameters = [dict(t.model.named_parameters()) for t in self.trials]
        self._stacked = {
            n: torch.stack([p[n].detach() for p in parameters]).requires_grad_() for n in self._names
        }
        # A parameter that some masks leave whole needs none of its own.
        self._removed = {n: r for n in self._names if (r := _removed(n, self.trials)) is not None}
        self._model = first.model
        self.optimizer = make_optimizer(list(self._stacked.values()))
        self.scheduler = make_scheduler(self.optimizer)
        self._last_rate = first.last_rate
        states = [t.state for t in self.trials]
        if first.state is not None and first.state.optimizer:
            load_optimizer(self.optimizer, _stack([s.optimizer for s in states if s is not None]))
        if self.scheduler is not None:
            replay(self.scheduler, total - 1 if self._last_rate else self.start)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs `[networks, examples, ...]` for inputs `[networks, examples, ...]`."""

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            output: Tensor = functional_call(self._model, parameters, (x,))
            return output

        outputs: Tensor = torch.func.vmap(one)(self._stacked, x)
        return outputs

    def steps(self) -> Iterator[int]:
        """Numbers of the steps; afterwards each trial's network is trained."""
        last = self.total if self.trials[0].stop is None else min(self.total, self.trials[0].stop)
        for trial in self.trials:
            trial.model.train()
        self._mask()
        for step in range(self.start, last):
            for trial in self.trials:
                trial.step = step
            yield step
            self._mask()
            if self.scheduler is not None and not self._last_rate:
                replay(self.scheduler, 1)
        self.show()
        tensors = optimizer_tensors(self.optimizer)
        for i, trial in enumerate(self.trials):
            trial.step = last
            model = {n: t.detach().clone() for n, t in trial.model.state_dict().items()}
            own = {n: (t[i].clone() if t.dim() else t.clone()) for n, t in tensors.items()}
            # Nothing was drawn: each has the random state that it began with.
            trial.end = State(last, model, own, trial.random, list(trial.log_))

    @torch.no_grad()
    def show(self) -> None:
        """Put the weights into the networks."""
        self._mask()
        for i, trial in enumerate(self.trials):
            for name, parameter in trial.model.named_parameters():
                parameter.copy_(self._stacked[name][i])

    @torch.no_grad()
    def _mask(self) -> None:
        for name, removed in self._removed.items():
            self._stacked[name].masked_fill_(removed, 0)


def _start(trial: Trial) -> tuple[int, bool, int | None, bool]:
    return trial.start, trial.last_rate, trial.stop, trial.state is None or not trial.state.optimizer


def _removed(name: str, trials: Sequence[Trial]) -> Tensor | None:
    masks: list[Masks] = [t.masks for t in trials]
    if not any(name in m and not bool(m[name].all()) for m in masks):
        return None
    shape = dict(trials[0].model.named_parameters())[name].shape
    whole = torch.ones(shape, dtype=torch.bool)
    return torch.stack([~m[name] if name in m else ~whole for m in masks])


def _stack(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of each network's optimizer, one on the other; numbers of steps are the same in all."""
    return {n: torch.stack([s[n] for s in states]) if t.dim() else t for n, t in states[0].items()}
