"""A training function made of settings: a network, tensors in memory, a loss, an optimizer, a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.errors import ScheduleError
from secateur.core.modes import evaluation
from secateur.lottery.together import Together, batchable
from secateur.lottery.trial import Trial

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Fit:
    """Train a classifier on tensors in memory; `train` of a `Lottery`.

        fit = sc.Fit(images, labels, steps=8000, batch=128,
                     optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4),
                     schedule=sc.milestones(4000, 6000), validation=(x, y), test=(x_test, y_test))

    Small networks are trained together with `many`, which gives what training them one after the other does,
    to floating-point tolerance.

    Attributes:
        inputs: `[examples, ...]`.
        labels: class of each.
        steps: optimizer steps of a whole training.
        batch: examples of a step.
        optimizer: makes the optimizer from parameters. One that treats every entry by itself, as SGD and Adam
            do, for networks that are trained together.
        schedule: step -> factor of the learning rate; None for a constant one.
        augment: `augment(inputs, generator)`, of a batch.
        loss: `loss(output, labels, reduction="none")`, one value an example.
        validation: inputs and labels on which loss and accuracy are logged every `every` steps.
        test: inputs and labels that are looked at once, after training.
        every: steps between looks at the validation data; None: 20 looks.
    """

    inputs: Tensor
    labels: Tensor
    steps: int
    test: tuple[Tensor, Tensor]
    batch: int = 128
    optimizer: MakeOptimizer = torch.optim.Adam
    schedule: Callable[[int], float] | None = None
    augment: Augment | None = None
    loss: Callable[..., Tensor] = F.cross_entropy
    validation: tuple[Tensor, Tensor] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.batch <= len(self.inputs):
            raise ScheduleError(
                f"Fit takes at least a step and a batch of 1 to {len(self.inputs)} examples; got "
                f"{self.steps} steps and batches of {self.batch}."
            )

    def __call__(self, model: nn.Module, trial: Trial) -> None:
        """Train one network."""
        optimizer = self.optimizer(model.parameters())
        for step in trial.steps(self.steps, optimizer, self._scheduler(optimizer)):
            x, y = self._examples(trial)
            optimizer.zero_grad()
            self.loss(model(x), y, reduction="none").mean().backward()
            optimizer.step()
            if self._looks(step):
                trial.log(**self._look(model))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test data."""
        return {"accuracy": _measure(model, self.loss, *self.test)["accuracy"]}

    def can_train_many(self, model: nn.Module) -> bool:
        """Whether `many` gives what one after the other does: nothing changes but parameters."""
        return batchable(model)

    def many(self, trials: Sequence[Trial]) -> None:
        """Train several networks of one architecture together, all from the same step on."""
        together = Together(trials, self.steps, self.optimizer, self._scheduler)
        for step in together.steps():
            x, y = self._examples_of_all(trials)
            together.optimizer.zero_grad()
            outputs = together(x)
            losses = self.loss(outputs.flatten(0, 1), y.flatten(), reduction="none")
            # The sum over networks: each has the gradient of its own mean.
            (losses.sum() / y.shape[1]).backward()
            together.optimizer.step()
            if self._looks(step):
                together.show()
                for trial in trials:
                    trial.log(**self._look(trial.model))

    def _examples(self, trial: Trial) -> tuple[Tensor, Tensor]:
        i = trial.batch(len(self.inputs), self.batch)
        x = self.inputs[i]
        return (x if self.augment is None else self.augment(x, trial.generator())), self.labels[i]

    def _examples_of_all(self, trials: Sequence[Trial]) -> tuple[Tensor, Tensor]:
        if self.augment is not None:
            pairs = [self._examples(trial) for trial in trials]
            return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
        i = torch.stack([trial.batch(len(self.inputs), self.batch) for trial in trials])
        return self.inputs[i], self.labels[i]

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return None if self.schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)

    def _looks(self, step: int) -> bool:
        every = self.every or max(1, self.steps // 20)
        return self.validation is not None and ((step + 1) % every == 0 or step + 1 == self.steps)

    def _look(self, model: nn.Module) -> dict[str, float]:
        assert self.validation is not None
        return _measure(model, self.loss, *self.validation)


@dataclass(frozen=True)
class Milestones:
    """A learning rate that is multiplied by `factor` at each of some steps, after a linear warm-up."""

    steps: tuple[int, ...]
    factor: float = 0.1
    warmup: int = 0

    def __call__(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warm * self.factor ** sum(step >= s for s in self.steps)


def milestones(*steps: int, factor: float = 0.1, warmup: int = 0) -> Milestones:
    """The schedule of most published tickets; see `Milestones`.

    >>> [milestones(10, 20)(step) for step in (9, 10)]
    [1.0, 0.1]
    """
    return Milestones(steps, factor, warmup)


@torch.no_grad()
def _measure(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> dict[str, float]:
    total, right = 0.0, 0
    with evaluation(model):
        for start in range(0, len(x), 1000):
            output = model(x[start : start + 1000])
            labels = y[start : start + 1000]
            total += float(loss(output, labels, reduction="none").double().sum())
            right += int((output.argmax(1) == labels).sum())
    return {"loss": total / len(x), "accuracy": right / len(x)}
