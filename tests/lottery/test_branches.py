"""Controls: what each of them has in common with the ticket, and what not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.core.errors import BudgetError, SecateurError, SparsityError
from secateur.lottery import Lottery, Store, Ticket
from secateur.lottery.branches import Prepared, shuffled
from secateur.lottery.experiment import Job, _Past
from tests.lottery.helpers import Noisy, accuracy, fit, net, noisy, task

CONTROLS = [
    sc.Reinitialised(),
    sc.RandomTicket(),
    sc.Shuffled(),
    sc.OneShot(),
    sc.AtInit(sc.SNIP()),
    sc.AtInit(sc.GraSP()),
    sc.AtInit(sc.SynFlow()),
    sc.Smaller(net),
    sc.Twin(),
]


def lottery(**more: object) -> Lottery:
    given = {"levels": 2, "rate": 0.5, "seeds": (0, 1), "rewind": sc.rewind_to(5)} | more
    return Lottery(net, fit(), batches=[task(64)], loss=F.cross_entropy, **given)  # type: ignore[arg-type]


def starts_from(ready: Prepared, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether survivors have these weights."""
    own = ready.model.state_dict()
    return all(torch.equal(own[n], state[n] * m) for n, m in ready.masks.items())


def test_what_controls_share_with_the_ticket(tmp_path: Path) -> None:
    run = lottery(controls=CONTROLS)
    table = run(tmp_path)
    store = Store(tmp_path)
    assert table.branches == ["ticket", "twin 1", *[b.name for b in CONTROLS[:-1]]]
    assert len(table) == 2 * (2 + 2 * 10)
    for seed in (0, 1):
        past = _Past(run, store, seed)
        init = store.state(run.key(Job(None, 0, seed, 0))).model
        early = store.state(run.key(Job(None, 0, seed, 5))).model
        for level in (1, 2):
            ticket = store.masks(run.key(Job(Ticket(), level, seed)))
            ready = {b.name: b.prepare(past, level) for b in CONTROLS}
            for name, r in ready.items():
                kept = store.masks(run.key(Job({b.name: b for b in CONTROLS}[name], level, seed)))
                assert kept == r.masks
                if name == "dense, smaller":
                    continue
                assert r.masks.kept == ticket.kept
                for n, m in r.masks.items():  # what is removed is zero, what stays is not
                    assert torch.equal(r.model.state_dict()[n] != 0, m)
            same = {n for n, r in ready.items() if r.masks == ticket}
            assert same - {"one shot"} == {"reinitialised", "twin 1"}
            for name in ("random", "shuffled"):
                assert ready[name].masks.by_layer() == ticket.by_layer()
            assert ready["random"].masks != ready["shuffled"].masks
            assert ready["one shot"].masks == ticket or level == 2

            for name in ("one shot", "shuffled", "twin 1"):
                assert (
                    starts_from(ready[name], early)
                    and ready[name].start == 5
                    and ready[name].state is not None
                )
            for name in ("SNIP at initialisation", "GraSP at initialisation", "SynFlow at initialisation"):
                assert starts_from(ready[name], init) and ready[name].start == 0
            for name in ("reinitialised", "random"):
                assert not starts_from(ready[name], init) and ready[name].start == 0
                own = past.fresh(draw=1).state_dict()
                assert starts_from(ready[name], own)
            assert ready["twin 1"].order == 1 and ready["twin 1"].state.random is None  # type: ignore[union-attr]
            small = sum(p.numel() for p in ready["dense, smaller"].model.parameters())
            left = sum(p.numel() for p in net().parameters()) - (ticket.entries - ticket.kept)
            assert 0.9 * left < small <= left
    finals = {(r.branch, r.level, r.seed): store.weights(r.key)["2.weight"] for r in table}
    assert not torch.equal(finals["ticket", 1, 0], finals["twin 1", 1, 0])


def test_a_job_needs_all_that_it_reads() -> None:
    """Workers that start jobs as their needs are met must find the ticket of the level, too."""
    run = lottery(controls=CONTROLS)
    for job in run.jobs():
        if job.branch is not None and job.level and job.branch != Ticket():
            assert Job(Ticket(), job.level, job.seed) in run.needs(job)
        for need in run.needs(job):
            assert run.jobs().index(need) < run.jobs().index(job)


def test_one_shot_prunes_the_dense_network(tmp_path: Path) -> None:
    run = lottery(controls=[sc.OneShot()], seeds=(0,))
    run(tmp_path)
    store = Store(tmp_path)
    model = net()
    model.load_state_dict(store.weights(run.key(Job(Ticket(), 0, 0))))
    want = sc.prune_(model, sc.Magnitude(), 0.75, allocation=sc.global_).masks
    assert store.masks(run.key(Job(sc.OneShot(), 2, 0))) == want


def test_shuffling_keeps_counts_and_moves_entries() -> None:
    g = torch.Generator().manual_seed(0)
    masks = sc.Masks({"a": torch.rand(30, 40, generator=g) < 0.3, "b": torch.rand(7, generator=g) < 0.5})
    found = shuffled(masks, 1, "x")
    assert found.by_layer() == masks.by_layer() and found != masks
    assert found == shuffled(masks, 1, "x") != shuffled(masks, 2, "x")


def test_a_ticket_on_other_data(tmp_path: Path) -> None:
    """Three classes there, four here: the head is new, the rest is the ticket's."""
    x, y = task()
    other = sc.Fit(
        x, (y + (x[:, 2] > 1)), steps=40, batch=32, test=(x, y), optimizer=partial(torch.optim.Adam, lr=0.01)
    )

    def four() -> torch.nn.Module:
        model = net()
        model[4] = torch.nn.Linear(16, 4)
        return model

    there = sc.Transfer(other, "there", make_model=four)
    by_chance = sc.Transfer(other, "there, shuffled", make_model=four, masks=False)
    run = lottery(controls=[there, by_chance])
    table = run(tmp_path)
    store = Store(tmp_path)
    assert {(r.branch, r.level) for r in table} == {
        (b, n) for b in ("ticket", "there", "there, shuffled") for n in (0, 1, 2)
    }
    ready = there.prepare(_Past(run, store, 1), 2)
    ticket = store.masks(run.key(Job(Ticket(), 2, 1)))
    early = store.state(run.key(Job(None, 0, 1, 5))).model
    assert ready.masks == ticket and ready.model[4].out_features == 4  # type: ignore[index,union-attr]
    for n, m in ticket.items():
        assert torch.equal(ready.model.state_dict()[n], early[n] * m)
    shuffled_ = by_chance.prepare(_Past(run, store, 1), 2).masks
    assert shuffled_ != ticket and shuffled_.by_layer() == ticket.by_layer()


def test_any_criterion_pattern_and_allocation(tmp_path: Path) -> None:
    run = lottery(
        criterion=sc.Taylor(),
        pattern=sc.Block(2, 2),
        allocation=sc.uniform,
        where=sc.Where(include="0.weight"),
        seeds=(0,),
    )
    run(tmp_path)
    masks = Store(tmp_path).masks(run.key(Job(Ticket(), 2, 0)))
    assert [*masks] == ["0.weight"] and masks.sparsity == pytest.approx(0.75, abs=0.01)
    tiles = masks["0.weight"].view(12, 2, 5, 2)
    assert torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match="fraction in"):
        lottery(rate=1.0)
    with pytest.raises(SecateurError, match="at least one seed"):
        lottery(seeds=())
    with pytest.raises(SecateurError, match="Two branches have one name"):
        lottery(controls=[sc.Twin(), sc.Twin()])
    with pytest.raises(SecateurError, match="at least 0"):
        lottery(levels=-1)
    with pytest.raises(SecateurError, match="order of its own"):
        sc.Twin(0)
    with pytest.raises(SecateurError, match="Pass evaluate="):
        Lottery(Noisy, lambda model, trial: None)
    with pytest.raises(BudgetError, match="smaller network"):
        lottery(controls=[sc.Smaller(lambda width: net(3.0))])(tmp_path)
    with pytest.raises(SecateurError):
        lottery(controls=[sc.Twin])
    assert noisy(evaluate=accuracy).seeds == (0, 1)
