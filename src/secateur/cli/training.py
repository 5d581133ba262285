"""The training of `secateur run`, which goes on where it was killed."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur import recipe
from secateur.checkpoint.journal import digest
from secateur.cli import shared
from secateur.cli.data import Data
from secateur.collect.batches import Batch
from secateur.core.errors import ArtifactError, NonFiniteError
from secateur.masks import Masks
from secateur.progress import track, watched
from secateur.recipe import Recipe, Training
from secateur.record import TrainLoss
from secateur.training import Distill, Method
from secateur.training.state_file import load_state, save_state

FOLDER = ".secateur-training"  # in the folder for the result, until that is there
_METHOD = "method."  # before the names of a method's own groups of tensors
_POINTS = 100  # of the course of the loss, at most
_LATELY = 20  # steps whose loss the progress bar shows


class Trainer:
    """A model, its optimizer, and what is pruned meanwhile: all that a step changes.

    Args:
        model: to train.
        asked: with `train` and `out`.
        given: the examples and their loss.
        held: masks of earlier pruning, which stay.
        method: what prunes meanwhile, if anything does.
        teacher: for distillation, if the recipe asks for it.
    """

    def __init__(
        self,
        model: nn.Module,
        asked: Recipe,
        given: Data,
        held: Masks,
        method: Method | None,
        teacher: nn.Module | None,
    ) -> None:
        assert asked.train is not None and asked.out is not None and asked.model is not None
        self.model, self.asked, self.plan, self.given = model, asked, asked.train, given
        self.held, self.method, self.teacher = held, method, teacher
        self._losses: list[float] = []  # of each step
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(trained.values(), lr=self.plan.rate, weight_decay=self.plan.decay)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.plan.rate  # as schedulers note it: learned scores follow the rate
        self._names = list(trained)
        self._file = asked.out / FOLDER / "state.safetensors"

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return len(self._losses)

    def resume(self) -> bool:
        """Take up a killed run with the same recipe, model and data; whether there was one.

        Raises `ArtifactError` if the folder for the result holds that of another run.
        """
        if not self._file.parent.exists():
            return False
        remedy = f"remove {self._file.parent} to begin anew, or choose another --out."
        if not self._file.is_file():  # killed before the first state
            return False
        state = load_state(self._file)
        if state.get("key") != self._key():
            raise ArtifactError(
                f"{self.asked.out} holds unfinished training with another recipe, model, data or versions: "
                + remedy
            )
        try:
            self._take(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{self._file} is damaged ({error}): {remedy}") from None
        return True

    def train(self, steps: int, minutes: float | None) -> None:
        """Up to so many steps in all, with a state on the disk every so many minutes; None for none."""
        plan = self.plan
        with ExitStack() as stack:
            if self.method is not None:
                attached = self.method.attach(self.optimizer, steps=plan.steps)
                stack.callback(attached.release)
            if self.held:
                stack.enter_context(self.held.hold(self.model, self.optimizer))
            distill = None
            if self.teacher is not None:
                settings = dict(plan.distill or {})
                distill = stack.enter_context(
                    recipe.call("train.distill", Distill, settings, student=self.model, teacher=self.teacher)
                )
            self.model.train()
            saved = time.monotonic()
            rounds = islice(_rounds(self.given, plan, self.asked.seed), self.step, steps)
            for part in track(rounds, self._lately, total=steps, done=self.step):
                self._one(part, distill)
                if minutes is not None and self.step < steps and time.monotonic() - saved >= 60 * minutes:
                    self._keep()
                    saved = time.monotonic()
                    if not watched():  # a log has no bar
                        shared.say(f"Step {self.step} of {plan.steps}: {self._lately()}; kept to go on from.")
            self.model.eval()
        if self.held:
            self.held.check(self.model)

    def losses(self) -> tuple[TrainLoss, ...]:
        """The course of the loss, in at most a hundred entries of as many steps each."""
        width = max(1, math.ceil(self.step / _POINTS))
        ends = [*range(width, self.step, width), self.step]
        starts = [0, *ends[:-1]]
        parts = [self._losses[start:end] for start, end in zip(starts, ends, strict=True)]
        return tuple(TrainLoss(end, statistics.fmean(part)) for end, part in zip(ends, parts, strict=True))

    def remove(self) -> None:
        """The result is there: the state is of no use any more."""
        shutil.rmtree(self._file.parent, ignore_errors=True)

    def _one(self, part: list[dict[str, Any]], distill: Distill | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * _factor(self.plan, self.step)
        self.optimizer.zero_grad()
        task = 0.0
        for batch in part:
            output = self.model(**{k: v for k, v in batch.items() if k != "labels"})
            assert self.given.loss is not None
            loss = self.given.loss(output, batch)
            task += loss.item() / len(part)
            (loss if distill is None else distill(loss, output)).div(len(part)).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip).item()
        if not math.isfinite(norm):  # so is a loss that is no number, whoever adds to it
            raise NonFiniteError(
                f"In step {self.step + 1} the training loss is {task:.4g} and the norm of the gradient {norm}"
                ": nothing is saved. A lower train.rate or a longer train.warmup may help."
            )
        self.optimizer.step()
        self._losses.append(task)

    def _lately(self) -> str:
        lately = self._losses[-_LATELY:]
        return f"training, loss {statistics.fmean(lately):.3f}" if lately else "training"

    def _keep(self) -> None:
        state: dict[str, Any] = {
            "key": self._key(),
            "model": _tensors(self.model),
            "random": {"torch": torch.get_rng_state()},
            "losses": {"task": torch.tensor(self._losses, dtype=torch.float64)},
        }
        for number, entries in self.optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                state.setdefault(f"optimizer.{key}", {})[self._names[number]] = torch.as_tensor(value)
        if self.method is not None:
            state |= {_METHOD + key: value for key, value in self.method.state_dict().items()}
        save_state(state, self._file)

    @torch.no_grad()
    def _take(self, state: Mapping[str, Any]) -> None:
        saved, present = state["model"], _tensors(self.model)
        if saved.keys() != present.keys():
            raise ValueError("it has other tensors than the model")
        for name, tensor in present.items():
            tensor.copy_(saved[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for group, tensors in state.items():
            if group.startswith("optimizer."):
                for name, tensor in tensors.items():
                    moments.setdefault(self._names.index(name), {})[group.removeprefix("optimizer.")] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict(whole | {"state": moments})
        if self.method is not None:
            own = {k.removeprefix(_METHOD): v for k, v in state.items() if k.startswith(_METHOD)}
            self.method.load_state_dict(own)
        torch.set_rng_state(state["random"]["torch"])
        self._losses = state["losses"]["task"].tolist()

    def _key(self) -> str:
        """A digest of all that decides the result."""
        assert self.asked.model is not None
        files = {
            path.name: f"{path.stat().st_size} {path.stat().st_mtime_ns}"
            for path in sorted(self.asked.model.iterdir())
            if path.suffix in (".json", ".safetensors")
        }
        settings = {
            "seed": str(self.asked.seed),
            "prune": json.dumps(self.asked.prune, sort_keys=True, default=str),
            "train": repr(self.plan),
        }
        return digest(settings, files, [Batch((), dict(b), None) for b in self.given.batches])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _factor(plan: Training, step: int) -> float:
    """Of the learning rate: a warm-up, then a linear fall to zero."""
    fall = (plan.steps - step) / max(1, plan.steps - plan.warmup)
    return min((step + 1) / max(1, plan.warmup), fall)


def _rounds(given: Data, plan: Training, seed: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of each step, in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    part: list[dict[str, Any]] = []
    examples = 0
    while True:
        for i in torch.randperm(len(given.batches), generator=generator).tolist():
            part.append(given.batches[i])
            examples += len(next(iter(part[-1].values())))
            if examples >= plan.batch:
                yield part
                part, examples = [], 0
