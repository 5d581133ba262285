"""Winning tickets on real data.

    python -m benchmarks.tickets lenet [--seeds 5] [--threads 2]    LeNet-300-100 on Fashion-MNIST
    python -m benchmarks.tickets resnet [--seeds 1] [--threads 2]   ResNet-20 on CIFAR JPEGs: hours
    python -m benchmarks.tickets speed                              8 networks together and one by one

`lenet`: tickets rewound to the initialisation, beside re-initialised and random tickets. `resnet`: rewound to
the initialisation and to step 350 of 1054, at three densities, each ticket trained twice for the barrier
between the two. Test images are looked at once, after each training; a tenth of the training images says
where training would have stopped early. Trainings are kept in `benchmarks/cache`, and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks import realdata
from benchmarks.realdata.nets import ResNet20
from benchmarks.training.loop import augmented
from secateur.lottery.trial import Trial
from secateur.ticket_demo import LeNet300
from secateur.ticket_page import accuracy_figure, plot_tickets

HERE = Path(__file__).parent
RESULTS, CACHE = HERE / "results", HERE / "cache"


def fashion(steps: int = 2500) -> sc.Fit:
    """Adam at the paper's rate; 2.8 epochs."""
    x, y = realdata.fashion_mnist("train")
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) < len(x) // 10
    flat = x.flatten(1)
    return sc.Fit(
        flat[~held],
        y[~held],
        steps=steps,
        batch=60,
        test=_flat(realdata.fashion_mnist("test")),
        validation=(flat[held], y[held]),
        optimizer=partial(torch.optim.Adam, lr=1.2e-3, fused=True),
        every=steps // 25,
    )


def _flat(data: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return data[0].flatten(1), data[1]


def lenet(seeds: int) -> None:
    """Down to 2 % in nine levels."""
    run = sc.Lottery(
        partial(LeNet300, 784),
        fashion(),
        levels=9,
        rate=0.35,
        seeds=range(seeds),
        controls=[sc.Reinitialised(), sc.RandomTicket()],
        name="LeNet-300-100 on Fashion-MNIST",
    )
    started = time.perf_counter()
    table = run(CACHE / "tickets")
    seconds = time.perf_counter() - started
    plot_tickets(table, CACHE / "tickets", CACHE / "tickets-lenet", run.name)
    table.csv(RESULTS / "tickets_lenet.csv")
    picture = accuracy_figure(table).png
    assert picture is not None
    (RESULTS / "tickets_lenet.png").write_bytes(picture)
    rows = [f"| {100 * _density(table, n):.2f} % | {_cells(table, n)} |" for n in range(run.levels + 1)]
    text = [
        "# LeNet-300-100 on Fashion-MNIST",
        "",
        f"Written by `python -m benchmarks.tickets lenet --seeds {seeds}` in {seconds / 60:.1f} minutes on",
        f"{_machine()} ({len(table)} trainings of {run.train.steps} steps; 0 minutes: all were kept).",  # type: ignore[attr-defined]
        "Test accuracy in per cent, mean over seeds and half of its 95 % confidence interval.",
        "",
        "| left | " + " | ".join(table.branches) + " |",
        "| ---: |" + " ---: |" * len(table.branches),
        *rows,
    ]
    (RESULTS / "tickets_lenet.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(table)


def _density(table: sc.TicketTable, level: int) -> float:
    return statistics.fmean(r.density for r in table if r.level == level)


def _cells(table: sc.TicketTable, level: int) -> str:
    found = {s.branch: s for s in table.summary() if s.level == level}
    return " | ".join(
        f"{100 * s.mean:.2f} ± {100 * (s.high - s.mean):.2f}" if (s := found.get(b)) else "—"
        for b in table.branches
    )


def untrained() -> torch.nn.Module:
    """ResNet-20, initialised as He et al. do."""
    model = ResNet20()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def resnet(seeds: int) -> None:
    """One epoch and a half a training, in steps of 64 images; 50, 25 and 12.5 % left."""
    x, y = realdata.cifar10("train")
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) < len(x) // 10
    steps, late_step = 3 * (int((~held).sum()) // 64) // 2, 350
    fit = sc.Fit(
        x[~held],
        y[~held],
        steps=steps,
        batch=64,
        test=realdata.cifar10("test"),
        validation=(x[held][:2000], y[held][:2000]),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
        schedule=sc.milestones(steps // 2, 3 * steps // 4, warmup=100),
        augment=augmented,
        every=steps // 8,
    )
    late = sc.Lottery(
        untrained,
        fit,
        levels=3,
        rate=0.5,
        seeds=range(seeds),
        rewind=sc.rewind_to(late_step),
        controls=[sc.Twin()],
        name=f"ResNet-20, rewound to step {late_step}",
    )
    early = late.but(rewind=sc.rewind_to(0), name="ResNet-20, rewound to initialisation")
    batches = [(x[i : i + 128], None) for i in range(0, 1280, 128)]
    lines = []
    for run in (late, early):
        table = run(CACHE / "tickets")
        paths = sc.barriers(run, CACHE / "tickets", points=5, batches=batches)
        for s in table.summary():
            if s.branch == "ticket":
                own = [p.barrier for p in paths if p.level == s.level]
                lines.append({"experiment": run.name, "left": s.density, "accuracy": s.mean, "barriers": own})
    data = {"steps": steps, "seeds": seeds, "machine": _machine(), "rows": lines}
    (RESULTS / "tickets_resnet.json").write_text(json.dumps(data, indent=1) + "\n")
    resnet_table(data)


def resnet_table(data: dict[str, Any]) -> None:
    """What `resnet` found, as Markdown."""
    lines = [
        "# ResNet-20 on CIFAR-10: when tickets can be rewound to their beginning",
        "",
        f"Written by `python -m benchmarks.tickets resnet --seeds {data['seeds']}` on {data['machine']}:",
        f"{data['steps']} steps a training. Test accuracy in per cent, mean over seeds. Barrier: the highest",
        "error on the straight line between a ticket and its twin, trained on the data in another order from",
        "the same rewound weights, minus the mean error of the two, in points of test accuracy.",
        "",
        "| rewound to | left | accuracy | barrier |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in data["rows"]:
        barrier = ", ".join(f"{100 * b:.1f}" for b in row["barriers"]) or "—"
        where = row["experiment"].removeprefix("ResNet-20, rewound to ")
        lines.append(f"| {where} | {100 * row['left']:.1f} % | {100 * row['accuracy']:.2f} | {barrier} |")
    lines += [
        "",
        "So short a training ends far from its limit. What it shows of the literature: trained from",
        "the initialisation, two copies of the dense network part (a barrier); from the later step",
        "they stay in one valley, at every density. What it does not show: that late rewinding is",
        "needed for accuracy. A ticket rewound to the initialisation is trained for all steps, one",
        "rewound later only for the rest, and each round adds to the masks what another training has",
        "found; far from convergence both outweigh the rest.",
    ]
    (RESULTS / "tickets_resnet.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def speed(threads: int) -> None:
    """Both ways in turns, five times; the same final accuracy."""
    found: dict[str, Any] = {"machine": _machine()}
    for name, inputs, steps in (("digits", 64, 300), ("Fashion-MNIST", 784, 300)):
        fit = fashion(steps)
        fit = sc.Fit(
            fit.inputs[:, :inputs],
            fit.labels,
            steps=steps,
            batch=60,
            test=(fit.test[0][:, :inputs], fit.test[1]),
            optimizer=fit.optimizer,
        )
        ratios, accuracies = [], []
        for _ in range(5):
            alone, together = _trials(inputs), _trials(inputs)
            started = time.perf_counter()
            for trial in alone:
                fit(trial.model, trial)
            between = time.perf_counter()
            fit.many(together)
            ratios.append((between - started) / (time.perf_counter() - between))
            accuracies = [[fit.evaluate(t.model)["accuracy"] for t in ts] for ts in (alone, together)]
        found[name] = {
            "times faster": [round(r, 2) for r in ratios],
            "median": statistics.median(ratios),
            "accuracy": [statistics.fmean(a) for a in accuracies],
        }
    found["threads"] = threads
    (RESULTS / "tickets_speed.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _trials(inputs: int) -> list[Trial]:
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = LeNet300(inputs)
        masks = sc.prune_(model, sc.Magnitude(), 0.5, allocation=sc.global_).masks
        found.append(Trial(model, masks, seed=seed))
    return found


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lenet", "resnet", "speed"])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "lenet":
        lenet(arguments.seeds or 5)
    elif arguments.what == "resnet":
        resnet(arguments.seeds or 1)
    else:
        speed(arguments.threads)


if __name__ == "__main__":
    main()
