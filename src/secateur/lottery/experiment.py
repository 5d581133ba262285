"""The experiment: levels of iterative pruning for several seeds, and controls beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.allocation import Allocation, global_
from secateur.collect import Loss
from secateur.core.errors import SecateurError, SparsityError
from secateur.core.names import Where, select
from secateur.criteria import Criterion, Magnitude
from secateur.lottery.branches import Branch, Need, Prepared, Ticket
from secateur.lottery.identity import describe, digest
from secateur.lottery.rewind import Rewind, describe_rewind, rewind_to
from secateur.lottery.store import Experiment, Finished, Store
from secateur.lottery.table import TicketTable
from secateur.lottery.trial import State, Trial
from secateur.masks import Masks
from secateur.patterns import Pattern
from secateur.progress import track
from secateur.prune import prune_, refuse_class
from secateur.training.draws import generator_at

Train = Callable[[nn.Module, Trial], None]
Evaluate = Callable[[nn.Module], Mapping[str, float] | float]


@runtime_checkable
class TrainsMany(Protocol):
    """A training function that trains several networks at once as it would one after the other."""

    def can_train_many(self, model: nn.Module) -> bool:
        """Whether such networks can be trained together."""

    def many(self, trials: Sequence[Trial]) -> None:
        """Train all of them."""


@dataclass(frozen=True)
class Job:
    """One training to be done: of a branch at a level, or with None the first steps of the dense network."""

    branch: Branch | None
    level: int
    seed: int
    step: int = 0


class Lottery:
    r"""Iterative magnitude pruning with rewinding, its controls, and several seeds.

        run = sc.Lottery(make_model, train, evaluate=accuracy, levels=10, rewind=sc.rewind_to(500),
                         seeds=range(5), controls=[sc.Reinitialised(), sc.RandomTicket()])
        table = run("runs/")

    Level 0 trains the dense network. Each level prunes the `rate` smallest of the weights that the one before
    kept, after training, and trains what is left again from where `rewind` says; so level n keeps
    :math:`(1 - rate)^n`. A seed draws the initialisation, the order of the data and its noise.

    Every training is kept in the folder under a digest of all that decided it. Called again, after a crash or
    with more levels, seeds or controls, only what is missing is trained.

    Args:
        make_model: makes a new network, initialised by torch's random state.
        train: `train(model, trial)`; see `Trial`. `Fit` is such a function, made of settings.
        evaluate: what is measured of a trained network, as a number or by name; `accuracy` is what pictures
            show. None: `train.evaluate`.
        levels: of pruning, after the dense one.
        rate: fraction of the remaining weights that each level removes.
        rewind: where survivors go back to.
        seeds: numbers.
        controls: branches that are trained at each level from 1 on beside the ticket.
        at: the levels at which controls are trained; None: all.
        criterion: what a weight is worth after training.
        pattern, allocation, where, batches, loss: as for `prune_`; of the trained network.
        small: whether networks are so small that several are trained together, where `train` can.
        name: goes into the digests: another one keeps what functions close over apart.

    Raises:
        SparsityError: a rate outside (0, 1).
        SecateurError: no seeds, two branches of one name, no way to evaluate.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        levels: int = 10,
        rate: float = 0.2,
        rewind: Rewind | None = None,
        seeds: Iterable[int] = range(3),
        controls: Sequence[Branch] = (),
        at: Iterable[int] | None = None,
        criterion: Criterion | None = None,
        pattern: Pattern | None = None,
        allocation: Allocation = global_,
        where: Where | None = None,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        small: bool = True,
        name: str = "",
    ) -> None:
        self._given = {k: v for k, v in locals().items() if k != "self"}
        for setting in (rewind, criterion, pattern, *controls):
            refuse_class(setting)
        if not 0 < rate < 1:
            raise SparsityError(f"Each level removes a fraction in (0, 1) of what is left; got {rate}.")
        if levels < 0:
            raise SecateurError(f"The number of levels is at least 0; got {levels}.")
        self.make_model, self.train = make_model, train
        found = evaluate if evaluate is not None else getattr(train, "evaluate", None)
        if found is None:
            raise SecateurError("Pass evaluate=, which measures a trained network.")
        self.evaluate: Evaluate = found
        self.levels, self.rate, self.rewind = levels, rate, rewind or rewind_to(0)
        self.seeds = tuple(dict.fromkeys(seeds))
        if not self.seeds:
            raise SecateurError("An experiment has at least one seed.")
        self.controls = tuple(controls)
        names = [b.name for b in (Ticket(), *self.controls)]
        if len(set(names)) < len(names):
            raise SecateurError(f"Two branches have one name: {', '.join(names)}. Give one another name=.")
        self.at = tuple(range(levels + 1)) if at is None else tuple(sorted(set(at)))
        self.criterion = criterion or Magnitude()
        self.pattern, self.allocation, self.where = pattern, allocation, where
        self.batches = None if batches is None else list(batches)
        self.loss, self.small, self.name = loss, small, name
        self._fits: bool | None = None  # whether networks can be trained together
        self._given |= {"seeds": self.seeds, "batches": self.batches, "at": self.at}  # what is read once

    def __call__(self, folder: str | os.PathLike[str]) -> TicketTable:
        """Train what is missing in a folder, and give all trainings of the experiment."""
        store = Store(folder)
        self.enter(store)
        for jobs in track(list(self.waves()), "trainings"):
            self.perform(store, jobs)
        return self.finished(store)

    def enter(self, store: Store) -> None:
        """Note in a folder that it holds this experiment, finished or not."""
        keys = [self.key(job) for job in self.jobs() if job.branch is not None]
        about = {
            "name": self.name,
            "seeds": list(self.seeds),
            "levels": self.levels,
            **{k: v for k, v in self._pruning.items() if isinstance(v, str | int | float) or k == "rewind"},
        }
        store.put_experiment(Experiment(self.name or describe_rewind(self.rewind), about, keys))

    def jobs(self) -> list[Job]:
        """All trainings, those that others need first."""
        return [job for wave in self.waves() for job in wave]

    def waves(self) -> Iterator[list[Job]]:
        """Jobs that do not need each other, of all seeds: what may be trained together."""
        done: set[Job] = set()
        for level in range(self.levels + 1):
            branches: list[Branch] = [Ticket()]
            branches += [
                b for b in self.controls if level in self.at and (level > 0 or getattr(b, "at_dense", False))
            ]
            for branch in branches:
                wave = [Job(branch, level, seed) for seed in self.seeds]
                before = dict.fromkeys(n for job in wave for n in self.needs(job))
                starts = [job for job in before if job not in done]
                if starts:
                    done |= set(starts)
                    yield starts
                done |= set(wave)
                yield wave

    def needs(self, job: Job) -> tuple[Job, ...]:
        """The jobs that one builds on."""
        if job.branch is None:
            return ()
        found: tuple[Need, ...] = job.branch.needs(job.level, self.rewind)
        if job.level and job.branch != Ticket():
            found += (Need(Ticket(), job.level),)  # whose density a result is shown at
        return tuple(dict.fromkeys(Job(n.branch, n.level, job.seed, n.step) for n in found))

    def finished(self, store: Store) -> TicketTable:
        """What a folder holds of this experiment."""
        keys = (self.key(job) for job in self.jobs() if job.branch is not None)
        return TicketTable(tuple(store.get(key) for key in keys if store.has(key)))

    def but(self, **changed: Any) -> Lottery:
        """The same experiment with other arguments."""
        return Lottery(**{**self._given, **changed})

    def settings(self, job: Job) -> dict[str, Any]:
        """All that decides a training, as plain data."""
        found: dict[str, Any] = {**self._base, "seed": job.seed}
        if job.branch is None:
            return found | {"first steps": job.step}
        if job.level or job.branch != Ticket():
            found |= self._pruning | {"branch": self._described(job.branch), "level": job.level}
        return found | {"needs": [self.key(n) for n in self.needs(job)]}

    def key(self, job: Job) -> str:
        """The digest under which a training is kept."""
        if job not in self._keys:
            self._keys[job] = digest(self.settings(job))
        return self._keys[job]

    def together(self, jobs: Sequence[Job]) -> bool:
        """Whether jobs of a wave are one batched training."""
        by_others = any(hasattr(job.branch, "train") for job in jobs)
        if not (self.small and len(jobs) > 1 and isinstance(self.train, TrainsMany)) or by_others:
            return False
        if self._fits is None:
            with torch.random.fork_rng(devices=[]):
                self._fits = self.train.can_train_many(self.make_model())
        return self._fits

    def perform(self, store: Store, jobs: Sequence[Job], minutes: float = 10.0) -> None:
        """Do trainings that do not need each other, unless they are done."""
        open_ = [job for job in jobs if not store.has(self.key(job))]
        if not open_:
            return
        many = self.train
        if self.together(jobs) and isinstance(many, TrainsMany):
            # All of them, though some may be done: rounding could depend on what is trained together.
            started = time.perf_counter()
            trials = [self._trial(store, job, minutes) for job in jobs]
            if all(many.can_train_many(trial.model) for trial in trials):
                many.many(trials)
                seconds = (time.perf_counter() - started) / len(jobs)
                for job, trial in zip(jobs, trials, strict=True):
                    if job in open_:
                        self._keep(store, job, trial, seconds)
                return
        for job in open_:
            started = time.perf_counter()
            trial = self._trial(store, job, minutes)
            if job.branch is None and job.step == 0:
                model = {n: t.detach().clone() for n, t in trial.model.state_dict().items()}
                trial.end = State(0, model)
            else:
                train: Train = getattr(job.branch, "train", self.train)
                trial.model.train()
                train(trial.model, trial)
            self._keep(store, job, trial, time.perf_counter() - started)

    def _trial(self, store: Store, job: Job, minutes: float) -> Trial:
        past = _Past(self, store, job.seed)
        if job.branch is None:
            model = past.fresh()
            ready = Prepared(model, past.whole(model))
        else:
            ready = job.branch.prepare(past, job.level)
        trial = Trial(
            ready.model,
            ready.masks,
            seed=job.seed,
            order=ready.order,
            start=ready.start,
            state=ready.state,
            last_rate=ready.last_rate,
            stop=job.step if job.branch is None else None,
            partial=store.partial(self.key(job)),
            minutes=minutes,
        )
        if ready.state is None or ready.state.random is None:
            trial.seed_torch()
        return trial

    def _keep(self, store: Store, job: Job, trial: Trial, seconds: float) -> None:
        end = trial.end
        if end is None:
            raise SecateurError(
                "The training function did not go through trial.steps(...) to its end: a training that stops "
                "by itself cannot be compared with others. Log the loss, and early_stop says where it was."
            )
        key, name = self.key(job), "start" if job.branch is None else job.branch.name
        found = Finished(key, self.settings(job), name, job.level, job.seed, 1.0, steps=end.step)
        found.log, found.seconds = end.log, seconds
        if job.branch is None:
            store.put(found, None, None, end)
            return
        trial.masks.check(trial.model)
        own = getattr(job.branch, "train", None)
        evaluate = getattr(job.branch, "evaluate", None) or getattr(own, "evaluate", None) or self.evaluate
        found.values = values_of(trial.model, evaluate)
        ticket = trial.masks
        if job.branch != Ticket() and job.level:
            ticket = store.masks(self.key(Job(Ticket(), job.level, job.seed)))
        found.density = ticket.density
        found.layers = {n: 1 - removed for n, removed in trial.masks.by_layer().items()}
        store.put(found, end.model, trial.masks)

    def _described(self, branch: Branch) -> Any:
        """Once for each: a branch may hold data."""
        if branch.name not in self._branches:
            self._branches[branch.name] = describe(branch)
        return self._branches[branch.name]

    @cached_property
    def _branches(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _keys(self) -> dict[Job, str]:
        return {}

    @cached_property
    def _base(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "make_model": describe(self.make_model),
            "train": describe(self.train),
            "evaluate": describe(self.evaluate),
        }

    @cached_property
    def _pruning(self) -> dict[str, Any]:
        return {
            "rate": self.rate,
            "rewind": describe(self.rewind),
            "criterion": repr(self.criterion),
            "pattern": repr(self.pattern),
            "allocation": describe(self.allocation),
            "where": repr(self.where),
            "batches": describe(self.batches),
            "loss": describe(self.loss),
        }


class _Past:
    """What branches may ask for, of one seed."""

    def __init__(self, lottery: Lottery, store: Store, seed: int) -> None:
        self._lottery, self._store, self.seed, self.rewind = lottery, store, seed, lottery.rewind

    def fresh(self, draw: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_at(self.seed, "initialisation", draw).initial_seed())
            return self._lottery.make_model()

    def state(self, step: int) -> State:
        return self._store.state(self._lottery.key(Job(None, 0, self.seed, step)))

    def weights(self, branch: Branch, level: int) -> Mapping[str, Tensor]:
        return self._store.weights(self._lottery.key(Job(branch, level, self.seed)))

    def masks(self, branch: Branch, level: int) -> Masks:
        return self._store.masks(self._lottery.key(Job(branch, level, self.seed)))

    def whole(self, model: nn.Module) -> Masks:
        targets = select(model, self._lottery.where).targets
        return Masks({t.name: torch.ones(t.weight.shape, dtype=torch.bool) for t in targets})

    def prune_(self, model: nn.Module, level: int, criterion: Criterion | None = None) -> Masks:
        run = self._lottery
        report = prune_(
            model,
            criterion or run.criterion,
            1 - (1 - run.rate) ** level,
            pattern=run.pattern,
            allocation=run.allocation,
            where=run.where,
            batches=run.batches if (criterion or run.criterion).needs else None,
            loss=run.loss if (criterion or run.criterion).needs else None,
        )
        return report.masks


def values_of(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """What is measured of a network, by name."""
    model.eval()
    with torch.no_grad():
        found = evaluate(model)
    if isinstance(found, Mapping):
        return {name: float(value) for name, value in found.items()}
    return {"accuracy": float(found)}
