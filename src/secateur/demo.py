"""The main job on an embedded default: a small network on scikit-learn's digits, pruned in many ways.

Everything is measured on test images that neither training nor any statistic has seen. Each seed trains its
own network; criteria see the same network, data and fine-tuning.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor, nn

from secateur import pages
from secateur.allocation import global_
from secateur.collect import collect
from secateur.core.errors import SecateurError
from secateur.core.files import write_text
from secateur.criteria import OBD, Criterion, Magnitude, Random, SynFlow, Taylor, Wanda
from secateur.inspection import Inspection, inspect
from secateur.masks import Masks
from secateur.progress import track
from secateur.prune import prune_
from secateur.record import Report, versions
from secateur.report import Section, percent, render
from secateur.report import Table as PageTable
from secateur.report.figures import Series, curves

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SHOWN = 0.9  # sparsity of the report that is printed layer by layer
EPOCHS, FINE_TUNE = 15, 3


@dataclass(frozen=True)
class Point:
    """Test accuracy of one criterion at one sparsity and seed, before and after fine-tuning."""

    criterion: str
    sparsity: float
    seed: int
    pruned: float
    tuned: float


@dataclass(frozen=True)
class Demo:
    """All that the demo measured."""

    dense: tuple[float, ...]
    points: tuple[Point, ...]
    report: Report
    before: Inspection
    after: Inspection
    seconds: float

    @property
    def baseline(self) -> float:
        """Mean test accuracy of the dense networks."""
        return statistics.fmean(self.dense)

    def values(self, criterion: str, sparsity: float, tuned: bool) -> list[float]:
        """Accuracies over the seeds."""
        return [
            p.tuned if tuned else p.pruned
            for p in self.points
            if p.criterion == criterion and p.sparsity == sparsity
        ]

    @property
    def criteria(self) -> list[str]:
        """Names in the order run."""
        return list(dict.fromkeys(p.criterion for p in self.points))


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers for 8 x 8 digits; 38,000 weights at width 1."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(1, round(n * width)) for n in (16, 32, 64))
        self.conv1 = nn.Conv2d(1, a, 3, padding=1)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1)
        self.fc1 = nn.Linear(16 * b, c)
        self.fc2 = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def criteria(seed: int) -> dict[str, Criterion]:
    """What the demo compares; random is the baseline."""
    return {
        "random": Random(seed),
        "magnitude": Magnitude(),
        "Taylor": Taylor(),
        "OBD (Fisher)": OBD(),
        "Wanda": Wanda(),
        "SynFlow": SynFlow(),
    }


def run(seeds: int = 3) -> Demo:
    """Train, prune and fine-tune; about half a minute for three seeds.

    One thread: the tensors are so small that a second one gains nothing, and loses minutes where the cores
    are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(seeds)
    finally:
        torch.set_num_threads(threads)


def _run(seeds: int) -> Demo:
    started = time.perf_counter()
    train, test = digits()
    dense: list[float] = []
    points: list[Point] = []
    jobs = [(seed, name) for seed in range(seeds) for name in ("dense", *criteria(0), "dense-small")]
    nets: dict[int, nn.Module] = {}
    for seed, name in track(jobs, "training and pruning", len(jobs)):
        if name == "dense":
            nets[seed] = _trained(DigitsNet(), train, EPOCHS, seed)
            dense.append(accuracy(nets[seed], test))
        elif name == "dense-small":
            points += [_dense_small(nets[seed], s, seed, train, test) for s in SPARSITIES]
        else:
            points += _prune_at_all(nets[seed], name, seed, train, test)
    net = copy.deepcopy(nets[0])
    before = inspect(net)
    report = prune_(net, Magnitude(), SHOWN, allocation=global_, example=test[0])
    after = inspect(net)
    return Demo(tuple(dense), tuple(points), report, before, after, time.perf_counter() - started)


def _prune_at_all(
    dense: nn.Module, name: str, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[Point]:
    criterion = criteria(seed)[name]
    data = _batches(train)
    stats = collect(dense, criterion.needs, data, F.cross_entropy) if criterion.rounds == 1 else None
    points = []
    for sparsity in SPARSITIES:
        net = copy.deepcopy(dense)
        source: dict[str, Any] = {"stats": stats} if stats else {"batches": data[:1]}
        masks = prune_(net, criterion, sparsity, allocation=global_, **source).masks
        pruned = accuracy(net, test)
        _train(net, train, FINE_TUNE, seed, masks)
        masks.check(net)
        points.append(Point(name, sparsity, seed, pruned, accuracy(net, test)))
    return points


def _dense_small(
    dense: nn.Module, sparsity: float, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Point:
    """The other way to so few weights: a narrower network, trained as long from the start."""
    target = (1 - sparsity) * sum(p.numel() for p in dense.parameters())
    width = min(
        (i / 100 for i in range(2, 101)),
        key=lambda w: abs(sum(p.numel() for p in DigitsNet(w).parameters()) - target),
    )
    net = _trained(DigitsNet(width), train, EPOCHS + FINE_TUNE, seed)
    score = accuracy(net, test)
    return Point("dense-small", sparsity, seed, score, score)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images `[n, 1, 8, 8]` in [0, 1] with labels: two thirds and a third, stratified."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise SecateurError("The demo reads scikit-learn's digits: pip install 'secateur[demo]'.") from None
    data = load_digits()
    x = torch.from_numpy(data.images).float().div(16)[:, None]
    y = torch.from_numpy(data.target).long()
    train, test = train_test_split(range(len(y)), test_size=1 / 3, random_state=0, stratify=data.target)
    return (x[train], y[train]), (x[test], y[test])


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Fraction of right answers."""
    net.eval()
    with torch.no_grad():
        return (net(data[0]).argmax(1) == data[1]).float().mean().item()


def _trained(net: DigitsNet, train: tuple[Tensor, Tensor], epochs: int, seed: int) -> DigitsNet:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():  # the usual initialisation of torch, from our own generator
        bound = 1 / (p[0].numel() ** 0.5) if p.dim() > 1 else 0.0
        nn.init.uniform_(p, -bound, bound, generator=generator)
    _train(net, train, epochs, seed)
    return net


def _train(
    net: nn.Module, train: tuple[Tensor, Tensor], epochs: int, seed: int, masks: Masks | None = None
) -> None:
    """Adam with a learning rate that falls to zero; masks are held if given."""
    x, y = train
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    batch = 64
    steps = epochs * ((len(x) + batch - 1) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    generator = torch.Generator().manual_seed(seed)
    hold = masks.hold(net, optimizer) if masks else None
    net.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    if hold:
        hold.release()


def _batches(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(64), data[1].split(64), strict=True))


def table(demo: Demo) -> Table:
    """Accuracy by criterion and sparsity, for the terminal."""
    out = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Digits, test accuracy; dense {_text(list(demo.dense))}",
        caption=f"per cent, mean ± standard deviation over {len(demo.dense)} seeds; dense-small is a "
        "narrower network with as many weights, trained from scratch for the same time",
    )
    out.add_column("criterion", no_wrap=True)
    out.add_column("", no_wrap=True)
    for sparsity in SPARSITIES:
        out.add_column(f"{sparsity:.0%}", justify="right", no_wrap=True)
    for name in demo.criteria:
        kinds = [("trained", True)] if name == "dense-small" else [("one shot", False), ("tuned", True)]
        for i, (kind, tuned) in enumerate(kinds):
            cells = [_text(demo.values(name, s, tuned)).replace(" ", "") for s in SPARSITIES]
            out.add_row(name if i == 0 else "", kind, *cells, end_section=i + 1 == len(kinds))
    return out


def page(demo: Demo) -> str:
    """The report page."""
    best = max(
        (name for name in demo.criteria if name not in ("random", "dense-small")),
        key=lambda name: statistics.fmean(demo.values(name, SHOWN, True)),
    )
    kept = statistics.fmean(demo.values(best, SHOWN, True))
    facts = [
        ("dense accuracy", percent(demo.baseline)),
        (f"at {SHOWN:.0%} sparsity, fine-tuned", f"{percent(kept)} ({best})"),
        ("seeds", str(len(demo.dense))),
        ("time for everything", f"{demo.seconds:.0f} s"),
    ]
    report = demo.report
    sections = [
        Section(
            "Accuracy over sparsity",
            "Test accuracy right after pruning in one shot, and after a short fine-tune with the masks held. "
            "Random pruning and a narrower network trained from scratch are the baselines to beat. Bands "
            "span the seeds.",
            [
                _curves(demo, tuned=False, title="one shot, no retraining"),
                _curves(demo, tuned=True, title=f"after {FINE_TUNE} epochs of fine-tuning"),
            ],
            [_page_table(demo, tuned=False), _page_table(demo, tuned=True)],
        ),
        pages.weights_section(demo.before, demo.after),
        pages.layers_section(report),
        pages.sizes_section(report.before, report.after),
        Section("What this does not show", notes=report.notes),
    ]
    subtitle = (
        f"A convolutional network on scikit-learn's handwritten digits, pruned by {len(demo.criteria) - 1} "
        f"criteria with one global ranking. Layers, weights and sizes are those of magnitude at {SHOWN:.0%}."
    )
    return render("Secateur demo", subtitle, facts, sections, pages.footer(versions()))


def write(demo: Demo, folder: Path) -> None:
    """Write `report.html` and `report.json`."""
    data = {
        "dense": list(demo.dense),
        "points": [asdict(p) for p in demo.points],
        "pruned": demo.report.to_dict(),
        "weights_before": demo.before.to_dict(),
        "weights_after": demo.after.to_dict(),
        "seconds": demo.seconds,
    }
    write_text(folder / "report.json", json.dumps(data, indent=1) + "\n")
    write_text(folder / "report.html", page(demo))


def _curves(demo: Demo, tuned: bool, title: str) -> Any:
    series = []
    for name in demo.criteria:
        values = [demo.values(name, s, tuned) for s in SPARSITIES]
        series.append(
            Series(
                name,
                SPARSITIES,
                [statistics.fmean(v) for v in values],
                [min(v) for v in values],
                [max(v) for v in values],
                dashed=name in ("random", "dense-small"),
            )
        )
    return curves(
        series,
        "sparsity",
        f"test accuracy, {title}",
        reference=("dense", demo.baseline),
        xformat=percent,
        yformat=percent,
        log_density=True,
        caption=title.capitalize() + ".",
    )


def _page_table(demo: Demo, tuned: bool) -> PageTable:
    rows: Sequence[Sequence[str]] = [
        (name, *(_text(demo.values(name, s, tuned)) for s in SPARSITIES)) for name in demo.criteria
    ]
    caption = "after fine-tuning" if tuned else "one shot"
    return PageTable(
        ("criterion", *(f"{s:.0%}" for s in SPARSITIES)), rows, f"Test accuracy in per cent, {caption}."
    )


def _text(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean
