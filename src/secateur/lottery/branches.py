"""What is trained at each level: the ticket, its controls, a twin, the same ticket on other data.

A branch says which finished trainings it builds on, and from them makes the network, the masks and the place
in training to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.core.errors import BudgetError, MaskError, ScheduleError
from secateur.criteria import Criterion
from secateur.lottery.trial import State
from secateur.masks import Masks
from secateur.training.draws import generator_at


@dataclass(frozen=True)
class Need:
    """A finished training of the same seed: of a branch at a level, or the first `step` steps of the dense.

    `branch` is None for the latter.
    """

    branch: Branch | None
    level: int = 0
    step: int = 0


@dataclass
class Prepared:
    """A training that can begin.

    Attributes:
        model: with the weights to start from, removed ones zero.
        masks: what stays.
        start: first step.
        state: optimizer and random state to go on with; None for new ones.
        last_rate: whether the learning rate stays the schedule's last.
        order: of the data.
    """

    model: nn.Module
    masks: Masks
    start: int = 0
    state: State | None = None
    last_rate: bool = False
    order: int = 0


@runtime_checkable
class Past(Protocol):
    """What branches may ask for: finished trainings, and how networks are made and pruned."""

    def fresh(self, draw: int = 0) -> nn.Module:
        """A new network with the seed's initialisation, or with another one."""

    def state(self, step: int) -> State:
        """The dense network's training after so many steps."""

    def weights(self, branch: Branch, level: int) -> Mapping[str, Tensor]:
        """What a training came to."""

    def masks(self, branch: Branch, level: int) -> Masks:
        """What stayed in it."""

    def whole(self, model: nn.Module) -> Masks:
        """Masks of what may be pruned, with nothing removed."""

    def prune_(self, model: nn.Module, level: int, criterion: Criterion | None = None) -> Masks:
        """Remove what the level asks of a network, by a criterion or the experiment's; all that stays."""

    @property
    def rewind(self) -> Any:
        """Where survivors go back to."""

    @property
    def seed(self) -> int:
        """Of the initialisation."""


@runtime_checkable
class Branch(Protocol):
    """What is trained at a level.

    One with a true `at_dense` is trained at level 0 too, one with `train` and `evaluate` by these.
    """

    @property
    def name(self) -> str:
        """In tables and pictures."""

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        """What has to be finished before."""

    def prepare(self, past: Past, level: int) -> Prepared:
        """The training, ready to begin."""


@dataclass(frozen=True)
class Ticket:
    """Iterative pruning: what the level before left is pruned further and rewound. Level 0 is dense.

    Reference: Frankle and Carbin 2019, The lottery ticket hypothesis.
    """

    name: str = "ticket"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        if level == 0:
            return (Need(None),)
        return (Need(self, level - 1), *((Need(None, step=rewind.step),) if rewind.weights else ()))

    def prepare(self, past: Past, level: int) -> Prepared:
        if level == 0:
            model = past.fresh()
            return Prepared(_with(model, past.state(0).model), past.whole(model))
        model = _with(past.fresh(), past.weights(self, level - 1))
        masks = past.prune_(model, level)
        if level > 1 and not masks <= past.masks(self, level - 1):
            raise MaskError(f"Level {level} would bring back weights that level {level - 1} removed.")
        if not past.rewind.weights:
            return Prepared(model, masks, past.rewind.step, None, not past.rewind.rate)
        return _rewound(past, masks)


@dataclass(frozen=True)
class OneShot:
    """The dense network pruned to the level's sparsity at once, and rewound."""

    name: str = "one shot"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket()), *((Need(None, step=rewind.step),) if rewind.weights else ()))

    def prepare(self, past: Past, level: int) -> Prepared:
        model = _with(past.fresh(), past.weights(Ticket(), 0))
        masks = past.prune_(model, level)
        if not past.rewind.weights:
            return Prepared(model, masks, past.rewind.step, None, not past.rewind.rate)
        return _rewound(past, masks)


@dataclass(frozen=True)
class Reinitialised:
    """The ticket's masks on another draw of the initialisation, trained from step 0."""

    name: str = "reinitialised"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket(), level),)

    def prepare(self, past: Past, level: int) -> Prepared:
        model, masks = past.fresh(draw=1), past.masks(Ticket(), level)
        masks.apply_(model)
        return Prepared(model, masks)


@dataclass(frozen=True)
class RandomTicket:
    """Random masks with the ticket's density in each layer, on another initialisation, from step 0."""

    name: str = "random"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket(), level),)

    def prepare(self, past: Past, level: int) -> Prepared:
        model = past.fresh(draw=1)
        masks = shuffled(past.masks(Ticket(), level), past.seed, f"random {level}")
        masks.apply_(model)
        return Prepared(model, masks)


@dataclass(frozen=True)
class Shuffled:
    """The ticket's masks with their entries shuffled within each layer, on the ticket's rewound weights."""

    name: str = "shuffled"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket(), level), Need(None, step=rewind.step))

    def prepare(self, past: Past, level: int) -> Prepared:
        return _rewound(past, shuffled(past.masks(Ticket(), level), past.seed, f"shuffled {level}"))


@dataclass(frozen=True)
class AtInit:
    """Pruned before training by a criterion, `SNIP()`, `GraSP()` or `SynFlow()`, and trained from step 0."""

    criterion: Criterion
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{type(self.criterion).__name__} at initialisation")

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(None),)

    def prepare(self, past: Past, level: int) -> Prepared:
        model = _with(past.fresh(), past.state(0).model)
        return Prepared(model, past.prune_(model, level, self.criterion))


@dataclass(frozen=True)
class Smaller:
    """A dense network with no more parameters than the ticket keeps.

    Args:
        make: `make(width)` with the width of the layers relative to the whole network, in (0, 1].
    """

    make: Callable[[float], nn.Module]
    name: str = "dense, smaller"

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket(), level),)

    def prepare(self, past: Past, level: int) -> Prepared:
        masks = past.masks(Ticket(), level)
        whole = past.fresh()
        most = sum(p.numel() for p in whole.parameters()) - (masks.entries - masks.kept)
        low, high = 0.0, 1.0
        best = None
        for _ in range(20):  # widths round to whole units long before
            width = (low + high) / 2
            torch.manual_seed(generator_at(past.seed, "smaller", 0).initial_seed())
            model = self.make(width)
            if sum(p.numel() for p in model.parameters()) <= most:
                low, best = width, model
            else:
                high = width
        if best is None:
            raise BudgetError(f"No width of the smaller network has at most {most:,} parameters.")
        return Prepared(best, Masks({}))


@dataclass(frozen=True)
class Twin:
    """The ticket once more from the same start, with another order of the data: what `barriers` compare.

    Reference: Frankle et al. 2020, Linear mode connectivity and the lottery ticket hypothesis.
    """

    order: int = 1
    name: str = ""
    at_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ScheduleError(f"A twin has an order of its own, 1 or more; got {self.order}.")
        if not self.name:
            object.__setattr__(self, "name", f"twin {self.order}")

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(None, step=rewind.step),) if level == 0 else Ticket().needs(level, rewind)

    def prepare(self, past: Past, level: int) -> Prepared:
        found = Ticket().prepare(past, level) if level else _rewound(past, past.whole(past.fresh()))
        if found.state is not None:  # its own random numbers, too
            found.state = replace(found.state, random=None)
        found.order = self.order
        return found


@dataclass(frozen=True)
class Transfer:
    """The ticket, found on the experiment's data, trained on others by another training function.

    Masks and rewound weights are the ticket's; optimizer and random state are new. A layer of another shape,
    the classifier for another number of classes say, is new and dense. `masks=False` takes shuffled masks
    instead: what a random ticket of the same layers' densities is worth there.

    Reference: Morcos et al. 2019, One ticket to win them all.
    """

    train: Callable[..., None]
    name: str
    evaluate: Callable[[nn.Module], Any] | None = None
    make_model: Callable[[], nn.Module] | None = None
    masks: bool = True
    at_dense: ClassVar[bool] = True

    def needs(self, level: int, rewind: Any) -> tuple[Need, ...]:
        return (Need(Ticket(), level), Need(None, step=rewind.step))

    def prepare(self, past: Past, level: int) -> Prepared:
        masks = past.masks(Ticket(), level)
        if not self.masks:
            masks = shuffled(masks, past.seed, f"{self.name} {level}")
        model = past.fresh()
        if self.make_model is not None:
            torch.manual_seed(generator_at(past.seed, self.name, 0).initial_seed())
            model = self.make_model()
        own = model.state_dict()
        found = {n: t for n, t in past.state(past.rewind.step).model.items() if n in own}
        found = {n: t for n, t in found.items() if own[n].shape == t.shape}
        _with(model, own | found)
        kept = Masks({n: m for n, m in masks.items() if n in found})
        kept.apply_(model)
        return Prepared(model, kept)


def shuffled(masks: Masks, seed: int, name: str) -> Masks:
    """The same number of entries in each layer, at random places."""
    found = {}
    for layer, mask in masks.items():
        g = generator_at(seed, f"{name} {layer}", 0)
        found[layer] = mask.flatten()[torch.randperm(mask.numel(), generator=g)].view(mask.shape)
    return Masks(found)


def _rewound(past: Past, masks: Masks) -> Prepared:
    state = past.state(past.rewind.step)
    model = _with(past.fresh(), state.model)
    masks.apply_(model)
    return Prepared(model, masks, past.rewind.step, state if past.rewind.step else None)


def _with(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(dict(state))
    return model
