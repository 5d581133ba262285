"""Passes that begin behind the blocks that are done, and end where all that is asked for was heard.

Repairing a deep model runs it once for each stage. All blocks before the stage would do each time what they
did before, so their last output is kept, and what comes after the stage is not run at all. Whether a model
can be entered in its middle is seen in one pass and checked again for each stage, on the first batch: where a
layer then hears anything else, the passes are whole ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.collect.batches import Batch
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.order import Inputs, Stage, listening, measuring

_ROUNDING = 1e-5  # of a layer's inputs, relative to the largest


class Enough(Exception):
    """All that a pass is for was heard."""


@dataclass(frozen=True)
class Chain:
    """Blocks that hand one hidden state on, in the order of execution.

    Attributes:
        blocks: names of modules that each run once in a pass.
        follows: whether a block receives what the one before it returned.
        before: by consumer, how many blocks are done when it is first called.
        heard: by consumer, numbers of the tensors that it took in, one for each call.
    """

    blocks: tuple[str, ...] = ()
    follows: tuple[bool, ...] = ()
    before: Mapping[str, int] = field(default_factory=dict)
    heard: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def begin(self, consumer: Consumer) -> int | None:
        """How many blocks are done when a consumer is first called; None if that was not seen."""
        if consumer.name in self.before:
            return self.before[consumer.name]
        inside = [
            i
            for i, block in enumerate(self.blocks)
            for path in consumer.holders
            if f"{path}.".startswith(f"{block}.")
        ]
        return min(inside, default=None)

    def last_before(self, n: int) -> set[int]:
        """Of the first `n` blocks those whose output goes elsewhere than to another of them."""
        return {i for i in range(n) if i == n - 1 or not self.follows[i + 1]}


def chain_of(model: nn.Module, consumers: Iterable[Consumer], batch: Batch) -> Chain:
    """What one pass shows of the blocks of lists and sequences in a model."""
    listed = dict(candidates(model))
    calls: list[tuple[str, Tensor | None, Tensor | None]] = []
    entered: list[Tensor | None] = []
    before: dict[str, int] = {}
    inputs = Inputs()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(_first((args, kwargs)))

    def leave(name: str, output: Any) -> None:
        calls.append((name, entered.pop(), _first(output)))

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        before.setdefault(consumer.name, len(calls))
        inputs.hear(consumer, x)

    with ExitStack() as stack:
        stack.enter_context(measuring(model))
        for name, module in listed.items():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda m, a, out, n=name: leave(n, out)).remove)
        stack.enter_context(listening(model, consumers, hear))
        stack.enter_context(suppress(Enough))
        batch.forward(model)
    times = Counter(name for name, _, _ in calls)
    once = [times[name] == 1 for name, _, _ in calls]
    kept = [call for call, alone in zip(calls, once, strict=True) if alone]
    follows = [given is not None and given is left for (_, _, left), (_, given, _) in pairwise(kept)]
    return Chain(
        tuple(name for name, _, _ in kept),
        (False, *follows)[: len(kept)],
        {name: sum(once[:n]) for name, n in before.items()},
        inputs.heard,
    )


def candidates(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children of lists and sequences, the outermost; a sequence among them is taken apart."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        is_listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if is_listed and not isinstance(child, nn.ModuleList | nn.Sequential | torch.jit.ScriptModule):
            yield path, child
        else:
            yield from candidates(child, path)


def _first(tree: Any) -> Tensor | None:
    return next((x for x in tree_leaves(tree) if isinstance(x, Tensor)), None)


class Passes:
    """Passes of one model over the same batches, each for one stage, stages in the order of execution.

    Holds the outputs of the last block that is done, on all batches.
    """

    def __init__(self, model: nn.Module, chain: Chain | None = None) -> None:
        self.model, self.chain = model, chain or Chain()
        self._outputs: dict[int, dict[int, Any]] = {}  # by position in the chain, then by batch
        self._done = 0  # blocks that are not run any more
        self._next = 0  # blocks that are done once the passes for this stage are
        self._stage: Stage = ()
        self._batches: set[int] = set()

    def enter(self, stage: Stage) -> bool:
        """What the passes that come are for; whether they begin behind a block."""
        kept = {i: self._outputs.get(i, {}) for i in self.chain.last_before(self._next)}
        begins = [self.chain.begin(c) for c in stage]
        if any(outputs.keys() != self._batches for outputs in kept.values()) or None in begins:
            self.whole()
        else:
            self._outputs, self._done = kept, self._next
            self._next = min(i for i in begins if i is not None)
            if self._next < self._done:
                self.whole()
        self._stage = stage
        self._batches.clear()
        return self._done > 0

    def whole(self) -> None:
        """From now on begin at the beginning."""
        self.chain, self._done, self._next, self._outputs = Chain(), 0, 0, {}

    def run(self, i: int, batch: Batch, calls: Mapping[str, int], keep: bool = True) -> None:
        """One pass over batch `i`, until the consumers of the stage were called so often."""
        with ExitStack() as stack:
            for k in range(self._done):
                stack.enter_context(_answering(self._block(k), self._outputs[self._answer(k)][i]))
            for k in self.chain.last_before(self._next) if keep else ():
                if k >= self._done:
                    stack.callback(_collecting(self._block(k), self._outputs.setdefault(k, {}), i))
            stack.enter_context(_until(self.model, self._stage, calls))
            with suppress(Enough):
                batch.forward(self.model)
        self._batches.add(i)

    def agree(self, batch: Batch, calls: Mapping[str, int]) -> bool:
        """Whether the stage hears the same where the pass over the first batch begins at the beginning."""
        heard = []
        whole = Passes(self.model)
        whole.enter(self._stage)
        with measuring(self.model):
            for passes in (self, whole):
                found: list[Tensor] = []
                with listening(self.model, self._stage, lambda c, m, x, f=found: f.append(x.clone())):  # type: ignore[misc]
                    passes.run(0, batch, calls, keep=False)
                heard.append(found)
        return len(heard[0]) == len(heard[1]) and all(map(_alike, *heard))

    def _block(self, k: int) -> nn.Module:
        return self.model.get_submodule(self.chain.blocks[k])

    def _answer(self, k: int) -> int:
        """The block whose output stands for that of block `k`, which only others that are done receive."""
        return min(j for j in self._outputs if j >= k)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if torch.equal(a, b) or not a.numel():
        return True
    return bool((a - b).abs().max() <= _ROUNDING * b.abs().max())


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """While this holds, a module returns what it once returned."""
    own = vars(module)
    had = own.get("forward")
    # A copy: the model may write to it.
    own["forward"] = lambda *args, **kwargs: _copied(output)
    try:
        yield
    finally:
        del own["forward"]
        if had is not None:
            own["forward"] = had


def _collecting(module: nn.Module, outputs: dict[int, Any], i: int) -> Any:
    """Keep what a module returns, until the function that is returned is called."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[i] = _copied(output)

    return module.register_forward_hook(keep).remove


def _copied(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


@contextmanager
def _until(model: nn.Module, stage: Sequence[Consumer], calls: Mapping[str, int]) -> Iterator[None]:
    """While this holds, the model's pass ends once all consumers of the stage had their calls."""
    left = Counter({c.name: calls[c.name] for c in stage if calls.get(c.name, 0) > 0})

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        left[consumer.name] -= 1
        if not any(n > 0 for n in left.values()):
            raise Enough

    if not left:
        yield
        return
    with listening(model, stage, hear):
        yield
