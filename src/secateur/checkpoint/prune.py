"""`prune_checkpoint`: a model folder into a pruned one, in the memory of one block, resumable."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocation import Allocation, Layer, uniform
from secateur.checkpoint.journal import Journal, Solved, digest
from secateur.checkpoint.norms import input_norms
from secateur.checkpoint.output import Output
from secateur.checkpoint.source import Source
from secateur.collect.batches import Batch, as_batches
from secateur.core.errors import ArtifactError, SecateurError, SparsityError, StatsError, StreamError
from secateur.core.names import Selection, Target, Where, select
from secateur.criteria import Criterion
from secateur.masks import Masks
from secateur.measure import Measurement, packed_size
from secateur.patterns import Pattern, Unstructured
from secateur.prune import refuse_class, shares_of
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.passes import Chain
from secateur.record import LayerRecord, Report
from secateur.solvers import Select, Solver
from secateur.stream import ranks
from secateur.stream.choose import called, route_of, visible
from secateur.stream.sequence import segments, solve_all_
from secateur.stream.solving import Done, Job
from secateur.stream.states import States
from secateur.stream.tuning import Reconstruct, error_notes, gain_notes
from secateur.stream.walk import Walk

_GB = 1 << 30


@dataclass(frozen=True)
class _Plan:
    """All that is known before the first block."""

    source: Source
    selection: Selection
    consumers: tuple[Consumer, ...]
    data: list[Batch]
    job: Job
    pattern: Pattern
    settings: dict[str, str]


@torch.no_grad()
def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    solver: Solver | Criterion,
    sparsity: float | None = None,
    *,
    batches: Iterable[Any],
    pattern: Pattern | None = None,
    allocation: Allocation = uniform,
    where: Where | None = None,
    correction: float | None = None,
    reconstruct: Reconstruct | None = None,
    spill: int = 4 * _GB,
    device: torch.device | str = "cpu",
) -> Report:
    """Prune the blocks of a Hugging Face model folder into another folder, in the memory of one block.

    The weights stay in their files: a block is read, pruned, written and forgotten before the next. The
    model's own forward makes all that a block is given; that running it block by block is the same as
    running it whole is seen on the first example before anything is written, else the model is refused.
    Works in float32 and stores weights in the types of the source; each block hears what those before it
    give with the weights as they are stored.

    Everything is done in a folder inside `out`. Killed at any moment, the same call goes on behind the last
    block that was finished, with the same result to the bit; the files become visible together at the end.
    Started by `torchrun`, each process takes a part of the batches, and the layers of a block are shared out.

    Args:
        source: folder with `config.json` and safetensors, in one file or shards; not changed.
        out: folder for the result; see `save`.
        solver: how a layer is pruned, see `prune_`; a criterion that needs no gradients selects weights and
            leaves the others alone.
        sparsity: fraction of the selected weights that go; None where the allocation decides.
        batches: calibration data, keyword arguments of the model.
        pattern: which entries may survive; `Unstructured()` if None.
        allocation: how much from each layer; those that rank scores get `Wanda`'s, of the dense model.
        where: which layers; only weights inside blocks and other layers that are not the head can be pruned.
        correction: see `prune_`.
        reconstruct: see `prune_`.
        spill: bytes of hidden states that are kept in memory as well as in files.
        device: on which blocks are run and solved.

    Returns:
        The report, as in the folder.

    Raises:
        SecateurError: one of its subclasses, for anything wrong with the input; nothing is left behind but
            what a later call can go on with.
    """
    started = time.perf_counter()
    refuse_class(solver)
    refuse_class(pattern)
    if isinstance(solver, Criterion):
        solver = Select(solver, steps=0)
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise SparsityError(f"Sparsity is the fraction removed, between 0 and 1; got {sparsity}.")
    source, out = Path(source), Path(out)
    if source.resolve() == out.resolve():
        raise ArtifactError(f"{out} is the model's own folder: choose another, the original is kept.")
    pattern = pattern or Unstructured()
    Job(solver, pattern, {}, correction)  # settings that mean nothing are refused before anything is read
    model = Source(source, device=device)
    selection, consumers = visible(
        model.model, select(model.model, where, valueless=True, experts=True), solver, where
    )
    for t in selection.targets:
        if t.name in model.head or t.name not in model.pieces:
            raise SecateurError(f"{t.name} is the output head, which is not read block by block.")
    for t in selection.targets:
        pattern.check(t.shape, t.run, t.name)
    data = list(as_batches(batches, model.device, f"{solver} fits weights to data"))
    settings = {
        "criterion": repr(solver),
        "sparsity": "as allocated" if sparsity is None else repr(sparsity),
        "pattern": repr(pattern),
        "allocation": getattr(allocation, "__name__", repr(allocation)),
    }
    settings |= {} if where is None else {"where": repr(where)}
    settings |= {} if correction is None else {"correction": repr(correction)}
    settings |= {} if reconstruct is None else {"reconstruct": repr(reconstruct)}
    key = digest(settings | {"ranks": str(ranks.count())}, model.stamps(), data)
    if len(data) < ranks.count():
        raise StatsError(f"There are fewer batches than processes ({ranks.count()}): pass more of them.")
    data = data[ranks.rank() :: ranks.count()]
    output = Output(out, model)
    with model.ending_before_the_head():
        journal = output.journal(key)
        # One chain for all processes: their first examples may reach other experts.
        chain = journal.chain if journal else ranks.share(_chain(model, consumers, data), 0)
        selection, consumers = called(selection, consumers, chain, solver, where)
        output.targets.update({t.name: t for t in selection.targets})
        if journal is None:
            heard = {name: list(numbers) for name, numbers in chain.heard.items()}
            journal = Journal(key, list(chain.blocks), list(chain.follows), dict(chain.before), heard)
            output.start()
            output.keep(journal)
        else:
            output.resume()
        if not journal.shares:
            layers = _layers(model, selection.targets, pattern, journal, consumers, data)
            journal.shares = shares_of(layers, allocation, sparsity)
            output.keep(journal)
        job = Job(solver, pattern, journal.shares, correction, model.stored())
        plan = _Plan(model, selection, consumers, data, job, pattern, settings)
        groups = segments(chain, len(chain.blocks), consumers)
        if journal.next <= max(groups):
            _solve(plan, journal, output, groups, reconstruct, spill, started)
    gains = [one.tuned for one in journal.layers.values() if one.tuned is not None]
    report = _report(plan, journal, (*error_notes(correction, reconstruct), *gain_notes(gains)))
    output.finish(report)
    return report


def _chain(model: Source, consumers: Sequence[Consumer], data: Sequence[Batch]) -> Chain:
    """The chain of blocks, checked; nothing is written before."""
    route = route_of(model.model, consumers, data, model)
    blocks = route.chain.blocks
    outside = [c.name for c in consumers if model.blocks_of[c.parameter] not in (None, *blocks)]
    why = route.why if route.limit < max(1, len(blocks) - 1) else None
    if why is None and outside:
        why = f"{outside[0]} is in no block that runs once"
    if why is not None:
        raise StreamError(
            f"{type(model.model).__name__} cannot be run block by block: {why.rstrip('.')}. Load it with "
            "load_hf and prune it in memory with prune_."
        )
    return route.chain


def _layers(
    model: Source,
    targets: Sequence[Target],
    pattern: Pattern,
    journal: Journal,
    consumers: Sequence[Consumer],
    data: Sequence[Batch],
) -> list[Layer]:
    """Layers for the allocation; scores are Wanda's, of one walk of the dense model when first asked for."""
    found: dict[str, Tensor] = {}

    def layer(t: Target) -> Layer:
        def matrix() -> Tensor:
            return t.layout.matrix(model.weight(t.name))

        def scores() -> Tensor:
            if not found:
                walk = Walk(model.model, journal.chain, data, States())
                found.update(input_norms(walk, model, consumers))
            return matrix().abs() * found[t.name]

        return Layer(t.name, t.shape, t.weight.shape, pattern, matrix, scores)

    return [layer(t) for t in targets]


def _solve(
    plan: _Plan,
    journal: Journal,
    output: Output,
    groups: Mapping[int, Sequence[Consumer]],
    reconstruct: Reconstruct | None,
    spill: int,
    started: float,
) -> None:
    """All blocks that are not done."""
    model, chain, n = plan.source, journal.chain, len(plan.data)
    twin = plan.job.correction is not None or reconstruct is not None
    folders = [output.states / f"{name}-{ranks.rank()}" for name in ("pruned", "dense")[: 1 + twin]]
    walks = [Walk(model.model, chain, plan.data, States(folder, spill // (1 + twin))) for folder in folders]
    for walk in walks:
        walk.states.resume(chain.last_before(journal.next), n)
        walk.done = journal.next
    targets = {t.name: t for t in plan.selection.targets}
    before = journal.seconds

    def finished(block: int, done: dict[str, Done]) -> None:
        output.write({name: one.keep for name, one in done.items()})
        for name, one in done.items():
            removed = one.keep.numel() - int(one.keep.count_nonzero())
            zeros = int((targets[name].weight == 0).count_nonzero())
            were = int((model.weight(name) == 0).count_nonzero())
            journal.layers[name] = Solved(removed, zeros, were, one.error, list(one.notes), one.tuned)
        journal.next = block + 1
        done.clear()  # the masks of all blocks would not fit in memory
        journal.seconds = before + time.perf_counter() - started
        journal.states = max(journal.states, sum(walk.states.peak for walk in walks))
        journal.peak = max(journal.peak, _peak())
        for walk in walks:
            walk.states.flush()
        output.keep(journal)
        for walk in walks:
            walk.states.settle()

    solve_all_(
        plan.job,
        walks[0],
        walks[1] if twin else None,
        groups,
        targets,
        len(chain.blocks),
        reconstruct,
        model,
        finished,
    )


def _peak() -> int:
    """Bytes of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _report(plan: _Plan, journal: Journal, remarks: tuple[str, ...]) -> Report:
    records = []
    for t in plan.selection.targets:
        one = journal.layers[t.name]
        shape = tuple(t.weight.shape)
        records.append(LayerRecord(t.name, shape, journal.shares[t.name], one.removed, one.zeros, one.error))
    before, after = _measurements(plan.source, journal)
    notes = [f"{name}: {note}" for name, one in journal.layers.items() for note in one.notes]
    notes += remarks
    notes.append(
        "Zeros in dense tensors: files and dense kernels do not get smaller or faster by themselves."
    )
    notes.append(
        f"Pruned block by block: the largest block has {plan.source.largest / 1e6:,.0f} MB in float32, "
        f"hidden states took up to {journal.states / 1e6:,.0f} MB of memory, the process "
        f"{journal.peak / 1e6:,.0f} MB at its peak."
    )
    return Report(
        plan.settings,
        tuple(records),
        plan.selection.skipped,
        before,
        after,
        tuple(notes),
        {"pruning": journal.seconds},
        Masks({}),
    )


def _measurements(source: Source, journal: Journal) -> tuple[Measurement, Measurement]:
    """Costs before and after, from one pass over the files of the source."""
    parameters = alive = dense = packed = alive_after = packed_after = 0
    by_key = {source.pieces[n].first: n for n in source.blocks_of}
    for name in by_key.values():
        pieces, width = source.pieces[name], source.dtype_of(name).itemsize
        size = math.prod(pieces.shape)
        one = journal.layers.get(name)
        zeros = one.were_zero if one else int((pieces.read(source.shards) == 0).count_nonzero())
        parameters += size
        dense += size * width
        alive += size - zeros
        packed += packed_size(size, size - zeros, width)
        left = one.zeros if one else zeros
        alive_after += size - left
        packed_after += packed_size(size, size - left, width)
    return (
        Measurement(parameters, alive, dense, packed),
        Measurement(parameters, alive_after, dense, packed_after),
    )
