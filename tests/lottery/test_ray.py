"""Trainings as tasks of a local Ray: the same store, the same results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.core.errors import ScheduleError
from secateur.integrations.ray import run_on_ray
from secateur.lottery import Lottery, Store, TicketTable, Twin
from tests.lottery.helpers import fit, net, noisy

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray about itself


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    root = Path(__file__).resolve().parents[2]
    paths = {"env_vars": {"PYTHONPATH": str(root)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=paths)
    yield
    ray.shutdown()


def values(table: TicketTable) -> list[object]:
    return [(r.key, r.branch, r.level, r.seed, r.density, r.values) for r in table]


def test_tasks_give_what_one_process_gives(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for run in (
            noisy(controls=[Twin(), sc.RandomTicket()], levels=2, rewind=sc.rewind_to(7)),
            Lottery(net, fit(30), levels=2, seeds=range(3), controls=[sc.Reinitialised()]),
        ):
            here, there = run(tmp_path / "here"), run_on_ray(run, tmp_path / "there")
            assert values(here) == values(there)
            a, b = Store(tmp_path / "here"), Store(tmp_path / "there")
            for r in here:
                ours = b.weights(r.key)
                assert all(torch.equal(t, ours[n]) for n, t in a.weights(r.key).items())
            before = {p: p.stat().st_mtime_ns for p in (tmp_path / "there").glob("??/*/training.json")}
            more = run.but(levels=3)
            assert len(run_on_ray(more, tmp_path / "there")) > len(there)
            assert all(p.stat().st_mtime_ns == t for p, t in before.items())
            assert [e.name for e in b.experiments()]
    finally:
        torch.set_num_threads(threads)


def test_what_a_task_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot start at step 30"):
        run_on_ray(Lottery(net, fit(30), levels=1, rewind=sc.rewind_rate(30)), tmp_path)
