"""Prune, retrain, prune: a few rounds, as good as they go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.allocation import Allocation, uniform
from secateur.collect import Loss
from secateur.core.digest import state_digest
from secateur.core.errors import ArtifactError, ScheduleError, SecateurError
from secateur.core.files import replacing, write_text
from secateur.core.names import Where, unwrap
from secateur.criteria import Criterion
from secateur.masks import Hold, Masks
from secateur.patterns import Pattern
from secateur.progress import track
from secateur.prune import prune_

Retrain = Callable[[nn.Module, Callable[[torch.optim.Optimizer], Hold], int], None]


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        asked: sparsity that was asked.
        sparsity: fraction that the masks remove.
        pruned: the metric after pruning, before retraining; None without a metric.
        retrained: the metric after retraining.
    """

    number: int
    asked: float
    sparsity: float
    pruned: float | None
    retrained: float | None


@dataclass(frozen=True)
class Rounds:
    """What came of it: the dense model's metric, every round, and the round whose weights the model has."""

    dense: float | None
    rounds: tuple[Round, ...]
    chosen: int
    masks: Masks

    @property
    def sparsity(self) -> float:
        """Of the model now."""
        return self.masks.sparsity

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the masks."""
        return {"dense": self.dense, "chosen": self.chosen, "rounds": [asdict(r) for r in self.rounds]}

    def __str__(self) -> str:
        def shown(value: float | None) -> str:
            return "" if value is None else f"{value:.4f}"

        lines = ["round  sparsity    pruned  retrained", f"dense    0.00 %  {shown(self.dense):>8}"]
        for r in self.rounds:
            mark = "  *" if r.number == self.chosen else ""
            figures = f"{shown(r.pruned):>8}   {shown(r.retrained):>8}"
            lines.append(f"{r.number:>5}  {100 * r.sparsity:>6.2f} %  {figures}{mark}")
        return "\n".join(lines)


def prune_in_rounds_(
    model: nn.Module,
    criterion: Criterion,
    sparsities: Sequence[float],
    retrain: Retrain,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    floor: float | None = None,
    higher_is_better: bool = True,
    pattern: Pattern | None = None,
    allocation: Allocation = uniform,
    where: Where | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Rounds:
    """Prune to each of `sparsities` in turn and retrain after each, in place.

        def retrain(model, hold, number):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            plan = torch.optim.lr_scheduler.LambdaLR(optimizer, sc.lr_rewinding(factor, total=160, steps=40))
            with hold(optimizer):
                ...

        sc.prune_in_rounds_(model, sc.Magnitude(), sc.geometric(0.9, 5), retrain, metric=accuracy, floor=0.88)

    A round starts from the weights that the one before left. With a floor, the rounds end at the first whose
    retrained metric is below, and the model gets the weights of the last that was not; if that is the dense
    model itself, an error is raised and the model is as it was. On any exception it is as it was, too.

    Args:
        model: any module.
        criterion: what a weight is worth; measured anew in each round if it needs data.
        sparsities: of the rounds, increasing.
        retrain: `retrain(model, hold, number)` trains with an optimizer of its own, on which `hold` keeps the
            zeros. The learning rate decides much: `lr_rewinding` beats `fine_tuning` at the same budget.
        metric: of the model, in evaluation mode and without gradients, on data that is not tested on.
        floor: worst metric that is accepted.
        higher_is_better: whether the metric is an accuracy or an error.
        pattern, allocation, where, batches, loss: as for `prune_`.
        folder: a finished round is written there, and not repeated when the same call is made again.

    Raises:
        ScheduleError: the sparsities do not increase.
        SecateurError: a floor without a metric; no round met the floor; anything that `prune_` raises.
        ArtifactError: the folder holds rounds of other settings or from other weights, or damaged ones.

    Reference: Han et al. 2015, Learning both weights and connections; Renda et al. 2020, Comparing rewinding
    and fine-tuning in neural network pruning.
    """
    steps = tuple(sparsities)
    if not steps or any(b <= a for a, b in zip((0.0, *steps), steps, strict=False)):
        raise ScheduleError(f"The sparsities of rounds increase, from above 0; got {steps}.")
    if floor is not None and metric is None:
        raise SecateurError("A floor needs a metric to compare with it: pass metric=.")
    model = unwrap(model)
    settings = {
        "criterion": repr(criterion),
        "sparsities": list(steps),
        "pattern": repr(pattern),
        "allocation": getattr(allocation, "__name__", repr(allocation)),
        "where": repr(where or Where()),
    }

    def measured() -> float | None:
        if metric is None:
            return None
        modes = [(m, m.training) for m in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                return float(metric(model))
        finally:
            for m, training in modes:
                m.training = training

    def good(value: float | None) -> bool:
        return floor is None or value is None or (value >= floor if higher_is_better else value <= floor)

    before = _state(model)
    store = None if folder is None else _Store(Path(folder), settings, before)
    best, chosen, masks = before, 0, Masks({})
    done: list[Round] = []
    try:
        dense = measured()
        for number, sparsity in track(list(enumerate(steps, 1)), "rounds"):
            saved = store.load(number, model) if store else None
            if saved is not None:
                found, held = saved
            else:
                report = prune_(
                    model,
                    criterion,
                    sparsity,
                    pattern=pattern,
                    allocation=allocation,
                    where=where,
                    batches=batches,
                    loss=loss,
                    rounds=1,
                )
                held = report.masks
                pruned = measured()
                retrain(model, partial(held.hold, model), number)
                held.check(model)
                found = Round(number, sparsity, held.sparsity, pruned, measured())
                if store:
                    store.save(found, model, held)
            done.append(found)
            if not good(found.retrained):
                break
            best, chosen, masks = _state(model), number, held
        if chosen == 0:
            raise SecateurError(
                f"The first round already has a metric of {done[0].retrained}, past the floor {floor}: begin "
                "with a smaller sparsity, retrain longer, or lower the floor."
            )
    except BaseException:
        model.load_state_dict(before)
        raise
    model.load_state_dict(best)
    return Rounds(dense, tuple(done), chosen, masks)


def geometric(sparsity: float, rounds: int) -> tuple[float, ...]:
    """Sparsities of rounds that each keep the same share of what is left.

    >>> geometric(0.75, 2)
    (0.5, 0.75)
    """
    if rounds < 1 or not 0 < sparsity < 1:
        raise ScheduleError(
            f"geometric takes a sparsity in (0, 1) and rounds >= 1; got {sparsity}, {rounds}."
        )
    return (*(1 - (1 - sparsity) ** (i / rounds) for i in range(1, rounds)), sparsity)


def lr_rewinding(factor: Callable[[int], float], *, total: int, steps: int) -> Callable[[int], float]:
    """The last `steps` of a learning-rate schedule of `total` steps, for `LambdaLR`: retrain with it again.

    Reference: Renda et al. 2020, section 2.
    """
    if not 0 < steps <= total:
        raise ScheduleError(f"Rewinding repeats 1 to {total} steps of the schedule; got {steps}.")
    return lambda step: factor(min(total, total - steps + step))


def fine_tuning(factor: Callable[[int], float], *, total: int) -> Callable[[int], float]:
    """The last learning rate of a schedule of `total` steps, constant, for `LambdaLR`."""
    return lambda _: factor(total - 1)


class _Store:
    """Finished rounds in a folder: weights, masks and figures of each, written in this order."""

    def __init__(self, folder: Path, settings: dict[str, Any], before: Mapping[str, Tensor]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        plan, wanted = folder / "rounds.json", settings | {"weights": state_digest(before)}
        if not plan.is_file():
            write_text(plan, json.dumps(wanted, indent=1) + "\n")
            return
        try:
            found = json.loads(plan.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{plan} is damaged ({error}): choose another folder.") from None
        if found != wanted:
            weights = isinstance(found, dict) and found == wanted | {"weights": found.get("weights")}
            what = "that began with other weights" if weights else "of other settings"
            raise ArtifactError(f"{folder} holds rounds {what}: choose another folder.")

    def save(self, found: Round, model: nn.Module, masks: Masks) -> None:
        stem = self.folder / f"{found.number:03}"
        tensors = {name: t.contiguous() for name, t in _state(model).items()}
        with replacing(stem.with_suffix(".safetensors")) as temporary:
            save_file(tensors, temporary)
        masks.save(stem.with_suffix(".masks"))
        write_text(stem.with_suffix(".json"), json.dumps(asdict(found)) + "\n")

    def load(self, number: int, model: nn.Module) -> tuple[Round, Masks] | None:
        stem = self.folder / f"{number:03}"
        figures, weights = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
        if not figures.is_file():
            return None
        try:
            found = Round(**json.loads(figures.read_text(encoding="utf-8")))
            tensors = load_file(weights)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise ArtifactError(f"Round {number} in {self.folder} is damaged: {error}.") from None
        model.load_state_dict(tensors)
        return found, Masks.load(stem.with_suffix(".masks"))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}
