"""Whether two trainings from one start end in one valley, and how much two tickets have in common."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.batchnorm import reestimate_batchnorm_
from secateur.core.errors import ArtifactError, SecateurError
from secateur.core.files import write_text
from secateur.lottery.branches import Ticket, Twin
from secateur.lottery.experiment import Job, Lottery, values_of
from secateur.lottery.identity import describe, digest
from secateur.lottery.rewind import rewind_to
from secateur.lottery.store import Store
from secateur.lottery.table import TicketTable
from secateur.masks import Masks
from secateur.progress import track


@dataclass(frozen=True)
class LinearPath:
    r"""Error along the straight line between two networks, :math:`\alpha a + (1 - \alpha) b`.

    Attributes:
        alphas: from 0 to 1.
        errors: at each of them.
        level, seed, density: of the ticket that was trained twice.
    """

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    level: int = 0
    seed: int = 0
    density: float = 1.0

    @property
    def barrier(self) -> float:
        """The largest error on the line, minus the mean of the errors at its ends.

        Below two points the two are called linearly connected, and the training stable to its noise.
        """
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2


@torch.no_grad()
def linear_path(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    error: Callable[[nn.Module], float],
    *,
    points: int = 11,
    batches: Iterable[Any] | None = None,
) -> LinearPath:
    """Errors at `points` places between two states of a network.

    Where it has batch normalisation, statistics of a mean network are not the mean of the statistics: they
    are measured anew on `batches`, at both ends too. Without batches they are interpolated.

    The model's own state is put back. Reference: Frankle et al. 2020, section 2.
    """
    if points < 3:
        raise SecateurError(f"A line has at least 3 points, both ends and one between; got {points}.")
    own = {name: t.detach().clone() for name, t in model.state_dict().items()}
    data = None if batches is None else list(batches)
    alphas = tuple(i / (points - 1) for i in range(points))
    errors = []
    modes = [(m, m.training) for m in model.modules()]
    try:
        for alpha in alphas:
            between = {
                name: torch.lerp(b[name], t, alpha) if t.is_floating_point() else t for name, t in a.items()
            }
            model.load_state_dict(between)
            if data is not None:
                reestimate_batchnorm_(model, data)
            model.eval()
            errors.append(float(error(model)))
    finally:
        model.load_state_dict(own)
        for m, training in modes:
            m.training = training
    return LinearPath(alphas, tuple(errors))


def barriers(
    lottery: Lottery,
    folder: str | os.PathLike[str],
    *,
    twin: Twin | None = None,
    points: int = 11,
    batches: Iterable[Any] | None = None,
    value: str = "accuracy",
) -> list[LinearPath]:
    """Paths between each ticket and its twin, which has seen the data in another order.

    The experiment needs a `Twin` among its controls, and to be finished in the folder. The error is one minus
    the value that `evaluate` gives. A path that was measured is kept, and not measured again.
    """
    twin = twin or next((b for b in lottery.controls if isinstance(b, Twin)), None)
    if twin is None or twin not in lottery.controls:
        raise SecateurError("Barriers are between tickets and their twins: pass controls=[sc.Twin(), ...].")
    store = Store(folder)
    data = None if batches is None else list(batches)
    how = {"points": points, "value": value, "batches": describe(data)}
    jobs = [job for job in lottery.jobs() if job.branch == twin]
    found = []
    for job in track(jobs, "paths"):
        pair = [lottery.key(Job(Ticket(), job.level, job.seed)), lottery.key(job)]
        kept = store.folder / "paths" / f"{digest([pair, how])}.json"
        path = _kept(kept)
        if path is None:
            with torch.random.fork_rng(devices=[]):
                model = lottery.make_model()
            ticket = store.get(pair[0])
            if value not in ticket.values:
                known = ", ".join(ticket.values)
                raise SecateurError(f"Nothing named {value!r} was evaluated, but {known}: pass value=.")
            density = ticket.density
            line = linear_path(
                model,
                store.weights(pair[0]),
                store.weights(pair[1]),
                lambda m: 1 - values_of(m, lottery.evaluate)[value],
                points=points,
                batches=data,
            )
            path = LinearPath(line.alphas, line.errors, job.level, job.seed, density)
            write_text(kept, json.dumps({**asdict(path), "pair": pair, "how": how}) + "\n")
        found.append(path)
    return found


def instability(
    lottery: Lottery, folder: str | os.PathLike[str], steps: Sequence[int], **how: Any
) -> dict[int, list[LinearPath]]:
    """Paths of the same experiment rewound to each of some steps: from which on is training stable?

    The dense network is trained once for all; `how` goes to `barriers`.
    """
    found = {}
    for step in steps:
        at = lottery.but(rewind=rewind_to(step))
        at(folder)
        found[step] = barriers(at, folder, **how)
    return found


@dataclass(frozen=True)
class Overlap:
    """What the tickets of several seeds have in common.

    Attributes:
        level: of pruning.
        density: mean.
        iou: intersection over union of two seeds' masks, mean over all pairs.
        by_chance: what random masks of the same density in each layer would have.
    """

    level: int
    density: float
    iou: float
    by_chance: float


def overlaps(table: TicketTable, folder: str | os.PathLike[str]) -> list[Overlap]:
    """Of the tickets at each level that is finished for two seeds or more."""
    store = Store(folder)
    tickets = [row for row in table if row.branch == Ticket().name and row.level > 0]
    found = []
    for level in sorted({row.level for row in tickets}):
        masks = [store.masks(row.key) for row in tickets if row.level == level]
        pairs = list(itertools.combinations(masks, 2))
        if pairs:
            iou = statistics.fmean(a.iou(b) for a, b in pairs)
            chance = statistics.fmean(iou_by_chance(a, b) for a, b in pairs)
            found.append(Overlap(level, statistics.fmean(m.density for m in masks), iou, chance))
    return found


def kept_paths(table: TicketTable, folder: str | os.PathLike[str]) -> list[LinearPath]:
    """The paths that were measured between trainings of an experiment, in the way that was last used."""
    keys = {row.key for row in table}
    files = list((Store(folder).folder / "paths").glob("*.json"))
    found = []
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        path = _kept(file)
        about = json.loads(file.read_text(encoding="utf-8"))
        if path is not None and set(about["pair"]) <= keys:
            found.append((about["how"], path))
    last = [path for how, path in found if how == found[-1][0]]
    return sorted(last, key=lambda path: (path.level, path.seed))


def iou_by_chance(a: Masks, b: Masks) -> float:
    """Expected intersection over expected union, were entries of each layer kept at random."""
    both = either = 0.0
    for name, mask in a.items():
        n = mask.numel()
        p, q = float(mask.count_nonzero()) / n, float(b[name].count_nonzero()) / n
        both += n * p * q
        either += n * (p + q - p * q)
    return both / either if either else 1.0


def _kept(path: Any) -> LinearPath | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return LinearPath(
            tuple(data["alphas"]), tuple(data["errors"]), data["level"], data["seed"], data["density"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): remove it, and the path is measured again."
        ) from None
