"""One training as a training function sees it: what stays zero, where it starts, which data comes when."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.core.errors import ArtifactError, ScheduleError
from secateur.masks import Masks
from secateur.training.draws import generator_at
from secateur.training.state_file import load_state, save_state


@runtime_checkable
class Scheduler(Protocol):
    """What is needed of torch's learning-rate schedulers."""

    def step(self) -> Any:
        """Set the rates of the next step."""


@dataclass
class State:
    """All that a step of training changes.

    Attributes:
        step: so many are done.
        model: parameters and buffers.
        optimizer: of each parameter, by number and name of the quantity.
        random: torch's random state.
        log: what was logged so far, as (step, values).
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    random: Tensor | None = None
    log: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        random = {} if self.random is None else {"torch": self.random}
        rest = json.dumps({"step": self.step, "log": self.log})
        save_state({"rest": rest, "model": self.model, "optimizer": self.optimizer, "random": random}, path)

    @classmethod
    def load(cls, path: Path) -> State:
        """Inverse of `save`; `ArtifactError` if it is damaged."""
        data = load_state(path)
        try:
            rest = json.loads(data["rest"])
            log = [(int(step), dict(values)) for step, values in rest["log"]]
            random = data.get("random", {}).get("torch")
            return cls(int(rest["step"]), data["model"], data.get("optimizer", {}), random, log)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is not the state of a training, or damaged: {error}.") from None


class Trial:
    """One training of one network.

        def train(model, trial):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4000, 6000])
            for step in trial.steps(8000, optimizer, scheduler):
                i = trial.batch(len(images), 128)
                optimizer.zero_grad()
                F.cross_entropy(model(images[i]), labels[i]).backward()
                optimizer.step()

    `steps` is the one line that a loop needs. It holds the masks, begins at the step that the network was
    rewound to with the optimizer, the schedule and torch's random state as they were there, and steps the
    scheduler. Data that comes by `batch` and noise that comes by `generator` depend on the step alone, so
    that they are rewound too.

    Attributes:
        model: the network.
        masks: what stays of it.
        start: the first step.
        seed: of the initialisation and the data.
        order: 0, or the number of another order of the same data and of another torch random state.
        step: at which training is.
        state: optimizer and random state to go on with.
        last_rate: whether the learning rate stays the schedule's last.
        stop: step after which it ends early.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        *,
        seed: int,
        order: int = 0,
        start: int = 0,
        state: State | None = None,
        last_rate: bool = False,
        stop: int | None = None,
        partial: Path | None = None,
        minutes: float = 10.0,
    ) -> None:
        self.model, self.masks = model, masks
        self.seed, self.order, self.start, self.step = seed, order, start, start
        self.state, self.last_rate, self.stop = state, last_rate, stop
        self._partial, self._minutes = partial, minutes
        self._orders: dict[tuple[int, int], Tensor] = {}
        self.log_: list[tuple[int, dict[str, float]]] = []
        self.random = None if state is None else state.random
        self.end: State | None = None  # what training came to, once `steps` is through

    def steps(
        self, total: int, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None = None
    ) -> Iterator[int]:
        """Numbers of the steps from `start` on, up to `total` in all.

        Raises `ScheduleError` if training has no step after the one that was rewound to.
        """
        if self.start >= total:
            raise ScheduleError(
                f"Training of {total} steps cannot start at step {self.start}: rewind to one before its end."
            )
        state = self.state
        if self._partial is not None and self._partial.is_file():
            state = State.load(self._partial)
            self.model.load_state_dict(state.model)
            self.log_ = state.log
        first = self.start if state is None else max(self.start, state.step)
        if state is not None:
            load_optimizer(optimizer, state.optimizer)
            if state.random is not None:
                torch.set_rng_state(state.random)
        if scheduler is not None:
            replay(scheduler, total - 1 if self.last_rate else first)
        saved = time.monotonic()
        last = total if self.stop is None else min(total, self.stop)
        with self.masks.hold(self.model, optimizer) if self.masks else nullcontext():
            for step in range(first, last):
                self.step = step
                yield step
                if scheduler is not None and not self.last_rate:
                    _quietly(scheduler.step)
                if self._partial is not None and time.monotonic() - saved >= 60 * self._minutes:
                    self._snapshot(step + 1, optimizer).save(self._partial)
                    saved = time.monotonic()
        self.step = last
        self.end = self._snapshot(last, optimizer)

    def batch(self, examples: int, size: int) -> Tensor:
        """Indices of this step's batch: a new permutation each epoch, its last incomplete batch left out."""
        if not 0 < size <= examples:
            raise ScheduleError(f"A batch of {size} cannot be drawn from {examples} examples.")
        each = examples // size
        epoch, place = divmod(self.step, each)
        key = (epoch, examples)
        if key not in self._orders:
            g = generator_at(self.seed, f"order {self.order}", epoch)
            self._orders = {key: torch.randperm(examples, generator=g)}
        return self._orders[key][place * size : (place + 1) * size]

    def generator(self) -> torch.Generator:
        """Random numbers of this step alone, for augmentation and noise."""
        return generator_at(self.seed, f"noise {self.order}", self.step)

    def log(self, **values: float) -> None:
        """Keep values of this step. That of the lowest `loss` is where training would have stopped early."""
        self.log_.append((self.step, {name: float(v) for name, v in values.items()}))

    def seed_torch(self) -> None:
        """Set torch's random state as it is at the beginning of training, for dropout and the like."""
        torch.manual_seed(generator_at(self.seed, f"torch {self.order}", 0).initial_seed())
        self.random = torch.get_rng_state()

    def _snapshot(self, step: int, optimizer: torch.optim.Optimizer) -> State:
        model = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        return State(step, model, optimizer_tensors(optimizer), torch.get_rng_state(), list(self.log_))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer, by number of the parameter and name of the quantity."""
    found = {}
    for number, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            if value is not None:
                found[f"{number}.{key}"] = torch.as_tensor(value).detach().clone()
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor.clone()
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def replay(scheduler: Scheduler, steps: int) -> None:
    """Bring a new scheduler to where it is after so many steps."""
    for _ in range(steps):
        _quietly(scheduler.step)


def _quietly(step: Callable[[], Any]) -> None:
    """Torch warns of schedulers that step before their optimizer, which replaying does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        try:
            step()
        except TypeError as error:
            raise ScheduleError(
                f"The scheduler cannot be rewound, as its steps need more than their number: {error}."
            ) from None
