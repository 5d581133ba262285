"""Where the survivors go back to before they are trained again."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.core.errors import ScheduleError


@dataclass(frozen=True)
class Rewind:
    """What a level of iterative pruning takes over from step `step` of the dense network's training.

    Attributes:
        step: from which a level is trained, to the end.
        weights: whether weights, buffers, optimizer state and torch's random state are those of that step.
            Otherwise a level goes on with the weights that the one before left, and a new optimizer.
        rate: whether the learning rate is that of the schedule from this step on. Otherwise it stays the last
            one of the schedule.

    Data order and augmentation are those from this step on in every case.
    """

    step: int = 0
    weights: bool = True
    rate: bool = True

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ScheduleError(f"Training is rewound to a step of 0 or more; got {self.step}.")


def rewind_to(step: int = 0) -> Rewind:
    """Everything back to a step: 0 is the initialisation, a few per cent of training is late rewinding.

    Reference: Frankle and Carbin 2019, The lottery ticket hypothesis; Frankle et al. 2020, Linear mode
    connectivity and the lottery ticket hypothesis.
    """
    return Rewind(step)


def rewind_rate(step: int) -> Rewind:
    """The weights stay, the learning rate goes back to a step.

    Reference: Renda et al. 2020, Comparing rewinding and fine-tuning in neural network pruning.
    """
    return Rewind(step, weights=False)


def fine_tune(step: int) -> Rewind:
    """The weights stay; as many steps as from `step` to the end, at the last learning rate."""
    return Rewind(step, weights=False, rate=False)


def describe_rewind(rewind: Rewind) -> str:
    """In a few words.

    >>> describe_rewind(rewind_to(500))
    'rewound to step 500'
    """
    if rewind.weights:
        return f"rewound to step {rewind.step}" if rewind.step else "rewound to initialisation"
    return f"learning rate rewound to step {rewind.step}" if rewind.rate else "fine-tuned"
