"""Run what is missing, then write the tables."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import benchmarks.structured as package

from . import latency, table
from .language import SMOLLM2
from .ours import Secateur
from .reference import TorchPruning
from .run import run
from .sentences import BANKING, STS
from .task import Method, Task
from .vision import RESNET20

TASKS: dict[str, Task] = {t.name: t for t in (RESNET20, STS, BANKING, SMOLLM2)}
METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        TorchPruning(),
        TorchPruning("random (torch-pruning)", ("random",), ("local",), ("interior",)),
        Secateur(),
        Secateur("secateur, no repair", repair=None),
        Secateur("random", random=True, repair=None),
    )
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*TASKS, "latency"], metavar="task")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="of random units, before fine-tuning")
    parser.add_argument("--tuned-seeds", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--targets", nargs="*", metavar="target", help='such as "MACs / 3"; all if not given')
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = [METHODS[name] for name in arguments.methods]
    for name in arguments.tasks:
        if name == "latency":
            latency.run()
        else:
            task = TASKS[name]
            if arguments.targets:
                task = replace(task, targets=tuple(t for t in task.targets if t.label in arguments.targets))
            run(task, methods, arguments.seeds, arguments.tuned_seeds)
        table.write(TASKS.values())


if __name__ == "__main__":
    main()
