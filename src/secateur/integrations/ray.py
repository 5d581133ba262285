"""Experiments with tickets on many machines: trainings as tasks of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import SecateurError
from secateur.lottery import Lottery, Store, TicketTable
from secateur.lottery.experiment import Job
from secateur.progress import track


def run_on_ray(lottery: Lottery, folder: str | os.PathLike[str], *, cpus: int = 1) -> TicketTable:
    """Train what is missing in a folder as `lottery(folder)` does, by tasks of Ray.

        import ray
        ray.init("auto")                      # a cluster; without it, the cores of this machine
        table = run_on_ray(run, "/shared/runs", cpus=2)

    A training begins when what it builds on is finished. Those that are trained together are one task; others
    are a task each. Called again, after a crash or on other machines, only what is missing is trained.

    Args:
        lottery: the experiment.
        folder: that all machines share.
        cpus: cores of a task, and its threads.

    Raises:
        SecateurError: Ray is not installed; or whatever a training raised.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise SecateurError("Tasks on many machines need Ray: pip install 'secateur[ray]'.") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    path = Path(folder).resolve()
    store = Store(path)
    lottery.enter(store)
    task = ray.remote(num_cpus=cpus)(_perform)
    shared = ray.put(lottery)
    running: dict[Job, Any] = {}
    for wave in lottery.waves():
        for jobs in [wave] if lottery.together(wave) else [[job] for job in wave]:
            if all(store.has(lottery.key(job)) for job in jobs):
                continue
            needs = {running[n] for job in jobs for n in lottery.needs(job) if n in running}
            running |= dict.fromkeys(jobs, task.remote(shared, str(path), jobs, cpus, *needs))
    for ref in track(list(dict.fromkeys(running.values())), "trainings"):
        ray.get(ref)
    return lottery.finished(store)


def _perform(lottery: Lottery, folder: str, jobs: list[Job], threads: int, *needs: Any) -> None:
    """Ray starts it when `needs` are there."""
    torch.set_num_threads(threads)
    lottery.perform(Store(folder), jobs)
