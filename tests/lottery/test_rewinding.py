"""What is rewound: weights, buffers, optimizer, schedule, data order, noise; what never comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.core.errors import ScheduleError
from secateur.lottery.experiment import Job, Lottery, _Past
from secateur.lottery.trial import Trial
from tests.lottery.helpers import Noisy, fit, net, noisy, task, train_noisy

Ticket = sc.lottery.Ticket


def job(level: int, seed: int = 0) -> Job:
    return Job(Ticket(), level, seed)


@pytest.mark.parametrize("step", [1, 13, 25])
def test_the_first_steps_and_the_rest_are_the_whole_bit_by_bit(step: int, tmp_path: Path) -> None:
    """Level 0 trained from step 0, and the same from the state after `step` steps."""
    run = noisy(levels=1, rewind=sc.rewind_to(step), seeds=(3,))
    run(tmp_path)
    store = sc.lottery.Store(tmp_path)
    state = store.state(run.key(Job(None, 0, 3, step)))
    assert state.step == step and "0.momentum_buffer" in state.optimizer
    model = Noisy()
    model.load_state_dict(state.model)
    trial = Trial(model, sc.Masks({}), seed=3, start=step, state=state)
    train_noisy(model, trial)
    whole = store.weights(run.key(job(0, 3)))
    assert whole.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert trial.end is not None and trial.end.step == 40


@pytest.mark.parametrize("step", [0, 7])
def test_survivors_start_from_the_weights_of_that_step(step: int, tmp_path: Path) -> None:
    run = noisy(rewind=sc.rewind_to(step))
    store = sc.lottery.Store(tmp_path)
    run(tmp_path)
    for seed in (0, 1):
        past, kept = _Past(run, store, seed), None
        first = store.state(run.key(Job(None, 0, seed, step)))
        for level in (1, 2, 3):
            ready = Ticket().prepare(past, level)
            masks = store.masks(run.key(job(level, seed)))
            assert ready.masks == masks and ready.start == step
            weights = 10 * 24  # the last layer is the head, which stays
            assert masks.entries - masks.kept == int((1 - 0.6**level) * weights + 0.5)
            assert kept is None or masks <= kept
            kept = masks
            for name, tensor in ready.model.state_dict().items():
                want = first.model[name] * masks[name] if name in masks else first.model[name]
                assert torch.equal(tensor, want), name  # buffers of the normalisation too
            final = store.weights(run.key(job(level, seed)))
            assert not any(final[name][~mask].any() for name, mask in masks.items())
            if step:
                assert ready.state is not None and ready.state.random is not None
                assert ready.state.optimizer.keys() == first.optimizer.keys() != set()
            # What went are the smallest of what the level before came to.
            before = store.weights(run.key(job(level - 1, seed)))["first.weight"].abs()
            mask = masks["first.weight"]
            assert before[mask].min() >= before[~mask].max()


def logged(run: Lottery, folder: Path, level: int) -> list[tuple[int, float]]:
    store = sc.lottery.Store(folder)
    run(folder)
    return [(step, v["rate"]) for step, v in store.get(run.key(job(level))).log]


def test_schedules_are_rewound_or_stay_at_their_end(tmp_path: Path) -> None:
    rates = [0.1] * 20 + [0.01] * 10 + [0.001] * 10
    for rewind, want in [
        (sc.rewind_to(0), list(enumerate(rates))),
        (sc.rewind_to(15), list(enumerate(rates))[15:]),
        (sc.rewind_rate(15), list(enumerate(rates))[15:]),
        (sc.fine_tune(15), [(step, 0.001) for step in range(15, 40)]),
    ]:
        found = logged(noisy(levels=1, rewind=rewind, seeds=(0,)), tmp_path, 1)
        assert [s for s, _ in found] == [s for s, _ in want]
        assert [r for _, r in found] == pytest.approx([r for _, r in want])


def test_without_rewinding_weights_a_level_goes_on_from_the_one_before(tmp_path: Path) -> None:
    run = noisy(rewind=sc.rewind_rate(15), seeds=(0,))
    run(tmp_path)
    store = sc.lottery.Store(tmp_path)
    ready = Ticket().prepare(_Past(run, store, 0), 2)
    before = store.weights(run.key(job(1)))
    assert ready.state is None and not ready.last_rate
    for name, tensor in ready.model.state_dict().items():
        want = before[name] * ready.masks[name] if name in ready.masks else before[name]
        assert torch.equal(tensor, want)
    assert not any(j.branch is None and j.step for j in run.jobs())  # no first steps are needed


def test_batches_depend_on_the_step_alone() -> None:
    def at(step: int, seed: int = 0, order: int = 0) -> torch.Tensor:
        trial = Trial(net(), sc.Masks({}), seed=seed, order=order)
        trial.step = step
        return trial.batch(10, 3)

    epochs = [torch.cat([at(3 * e + i) for i in range(3)]) for e in range(3)]
    assert all(len(set(e.tolist())) == 9 for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(at(5), at(5)) and not torch.equal(epochs[0][:3], at(0, order=1))
    assert not torch.equal(epochs[1], torch.cat([at(3 + i, seed=1) for i in range(3)]))
    with pytest.raises(ScheduleError, match="batch of 11"):
        Trial(net(), sc.Masks({}), seed=0).batch(10, 11)


def test_what_cannot_be_rewound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="step of 0 or more"):
        sc.rewind_to(-1)
    with pytest.raises(ScheduleError, match="cannot start at step 60"):
        Lottery(net, fit(), levels=1, seeds=(0,), rewind=sc.rewind_rate(60))(tmp_path)

    def plateau(model: torch.nn.Module, trial: sc.Trial) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        for _ in trial.steps(3, optimizer, scheduler):
            optimizer.step()

    with pytest.raises(ScheduleError, match="scheduler cannot be rewound"):
        Lottery(net, plateau, evaluate=lambda m: 0.0, levels=0)(tmp_path)

    def stops(model: torch.nn.Module, trial: sc.Trial) -> None:
        for step in trial.steps(9, torch.optim.SGD(model.parameters(), lr=0.1)):
            if step == 3:
                break

    with pytest.raises(sc.SecateurError, match="did not go through"):
        Lottery(net, stops, evaluate=lambda m: 0.0, levels=0)(tmp_path)


def test_a_training_goes_on_where_it_was_killed_bit_by_bit(tmp_path: Path) -> None:
    whole, half = Noisy(), Noisy()
    half.load_state_dict(whole.state_dict())
    first = Trial(whole, sc.Masks({}), seed=0)
    first.seed_torch()
    train_noisy(whole, first)

    class Killed(Exception):
        pass

    def dies(step: int) -> Trial:
        trial = Trial(half, sc.Masks({}), seed=0, partial=tmp_path / "p.safetensors", minutes=0)
        trial.seed_torch()
        log = trial.log

        def logs(**values: float) -> None:
            log(**values)
            if trial.step == step:
                raise Killed

        trial.log = logs  # type: ignore[method-assign]
        return trial

    start = {k: v.clone() for k, v in whole.state_dict().items()}
    for step in (11, 12, 31):
        with pytest.raises(Killed):
            train_noisy(half, dies(step))
        half = Noisy()  # the process is gone
    torch.manual_seed(99)
    last = dies(1000)
    train_noisy(half, last)
    assert all(torch.equal(t, start[n]) for n, t in half.state_dict().items())
    assert last.end is not None and first.end is not None and last.end.log == first.end.log
    x, _ = task(20)
    assert torch.equal(half.eval()(x), whole.eval()(x))
