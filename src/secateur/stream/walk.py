"""A model run block by block over the same batches, each block once its predecessors are done.

Every pass is the model's own forward: blocks that are done answer with what the last of them returned, so
all arguments of the next block (masks, rotary embeddings, biases of positions) are those that the model
itself makes. The pass ends where all that is asked for was heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.collect.batches import Batch
from secateur.core.errors import SecateurError, StatsError
from secateur.reconstruct.consumers import Consumer
from secateur.reconstruct.order import listening, measuring
from secateur.reconstruct.passes import Chain, Enough, candidates, chain_of
from secateur.stream import ranks
from secateur.stream.states import States, copied

_ROUNDING = 1e-4  # of the projections of an output, relative to its norm


@runtime_checkable
class Weights(Protocol):
    """Where the weights of blocks are while they are not at work."""

    def resident(self, block: str) -> AbstractContextManager[None]:
        """While this holds, the weights of a block are in memory."""


class InMemory:
    """All weights are in memory all the time."""

    @contextmanager
    def resident(self, block: str) -> Iterator[None]:
        """Nothing to do."""
        yield


class Walk:
    """Where a model stands: how many blocks are done, and what the last of them returned for each batch."""

    def __init__(self, model: nn.Module, chain: Chain, data: Sequence[Batch], states: States) -> None:
        self.model, self.chain, self.data, self.states = model, chain, data, states
        self.done = 0

    @property
    def data_device(self) -> torch.device:
        """Where the batches are."""
        return next(
            (
                x.device
                for x in tree_leaves((self.data[0].args, self.data[0].kwargs))
                if isinstance(x, Tensor)
            ),
            torch.device("cpu"),
        )

    def run(self, i: int, stop: int | None = None) -> Any:
        """One pass over batch `i`, from the last block that is done.

        It ends when block `stop - 1` has returned, or when a hook raises `Enough`.

        Returns what that block returned; None if the pass ended elsewhere.
        """
        found: list[Any] = []
        with ExitStack() as stack:
            self._answer(i, stack)
            if stop is not None and self.done < stop <= len(self.chain.blocks):
                stack.callback(_ending(self._block(stop - 1), found))
            number = i * ranks.count() + ranks.rank()
            # Models that draw in their forward pass draw the same every time, whichever process runs it.
            torch.manual_seed(number)
            with suppress(Enough):
                self._forward(i, number)
        return found[0] if found else None

    def advance(self, stop: int, weights: Weights | None = None) -> None:
        """Run the blocks before `stop` that are not done, and keep what is handed on."""
        weights = weights or InMemory()
        for n in range(self.done + 1, stop + 1):
            kept = self.chain.last_before(n)
            with weights.resident(self.chain.blocks[n - 1]), measuring(self.model):
                for i in range(len(self.data)):
                    output = self.run(i, n)
                    if output is None:
                        raise StatsError(f"{self.chain.blocks[n - 1]} is not called for batch {i}.")
                    self.states.put(n - 1, i, output)
            self.done = n
            for slot in set(self.states.slots) - kept:
                self.states.drop(slot)

    def _answer(self, i: int, stack: ExitStack) -> None:
        trees = {slot: self.states.get(slot, i) for slot in sorted(self.chain.last_before(self.done))}
        for k in range(self.done):
            slot = next(s for s in trees if s >= k)
            # What the others return goes into a block that is done; the model may write to that of the last.
            answer = copied(trees[slot]) if k == slot else trees[slot]
            stack.enter_context(_answering(self._block(k), answer))

    def _forward(self, i: int, number: int) -> None:
        try:
            self.data[i].forward(self.model)
        except (SecateurError, Enough):
            raise
        except Exception as error:  # a forward pass can fail in as many ways as there are models
            raise StatsError(
                f"{type(self.model).__name__} fails on batch {number}: {first_line(error)} Batches hold the "
                "arguments of the model."
            ) from error

    def _block(self, k: int) -> nn.Module:
        return self.model.get_submodule(self.chain.blocks[k])


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """While this holds, a module returns `output`."""
    own = vars(module)
    had = own.get("forward")
    own["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del own["forward"]
        if had is not None:
            own["forward"] = had


def _ending(module: nn.Module, found: list[Any]) -> Callable[[], None]:
    """End the pass when a module returns; until the function that is returned is called."""

    def hear(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise Enough

    return module.register_forward_hook(hear).remove


def enterable(
    model: nn.Module, consumers: Sequence[Consumer], batch: Batch, weights: Weights | None = None
) -> tuple[Chain, int, str | None]:
    """The blocks of a model, and behind how many of them it can be entered.

    One plain pass over a batch notes what every block returns and every layer takes in; then the blocks are
    walked one by one, and must return and hear the same.

    Returns the chain, the largest number of blocks behind which all that follows is the same, and why not
    behind more.
    """
    weights = weights or InMemory()
    plain: dict[str, list[Tensor]] = {}
    with _noting(model, consumers, plain), _coming(model, weights):
        chain = chain_of(model, consumers, batch)
    walk = Walk(model, chain, [batch], States())
    for n, block in enumerate(chain.blocks, 1):
        heard: dict[str, list[Tensor]] = {}
        mine = [c for c in consumers if chain.begin(c) == n - 1]  # a block that is done is called, too
        try:
            with _noting(model, mine, heard, (block,)):
                walk.advance(n, weights)
        except Exception as error:  # whatever a model does with answers that it does not expect
            return chain, max(n - 2, 0), f"{block} fails when it is run alone: {first_line(error)}"
        for name in heard:
            if not _alike(heard[name], plain.get(name, [])):
                return chain, max(n - 2, 0), f"{name} is given something else when all blocks before are done"
    if not chain.blocks:
        return chain, 0, "it has no list of blocks that run once each"
    heard = {}
    try:
        mine = [c for c in consumers if chain.begin(c) == len(chain.blocks)]
        with _noting(model, mine, heard, ()), measuring(model):
            walk.run(0)
    except Exception as error:
        return chain, len(chain.blocks) - 1, f"it fails when all blocks are done: {first_line(error)}"
    for name in heard:
        if not _alike(heard[name], plain.get(name, [])):
            return chain, len(chain.blocks) - 1, f"{name} is given something else when all blocks are done"
    return chain, len(chain.blocks), None


def first_line(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."


@contextmanager
def _coming(model: nn.Module, weights: Weights) -> Iterator[None]:
    """While this holds, blocks have their weights while they are called."""
    with ExitStack() as stack:
        open_: dict[str, ExitStack] = {}
        for name, module in candidates(model):

            def enter(module: nn.Module, args: Any, n: str = name) -> None:
                open_[n] = ExitStack()
                open_[n].enter_context(weights.resident(n))

            def leave(module: nn.Module, args: Any, output: Any, n: str = name) -> None:
                open_.pop(n).close()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        try:
            yield
        finally:
            for left in open_.values():
                left.close()


@contextmanager
def _noting(
    model: nn.Module,
    consumers: Sequence[Consumer],
    notes: dict[str, list[Tensor]],
    blocks: Sequence[str] | None = None,
) -> Iterator[None]:
    """While this holds, note prints of what blocks return and consumers take in."""

    def hear(consumer: Consumer, module: nn.Module, x: Tensor) -> None:
        notes.setdefault(consumer.name, []).append(_print(x))

    with ExitStack() as stack:
        stack.enter_context(listening(model, consumers, hear))
        listed = candidates(model) if blocks is None else ((b, model.get_submodule(b)) for b in blocks)
        for name, module in listed:

            def leave(module: nn.Module, args: Any, output: Any, n: str = name) -> None:
                notes.setdefault(n, []).extend(
                    _print(x) for x in tree_leaves(output) if isinstance(x, Tensor)
                )

            # First of the hooks: another one ends the pass.
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
        yield


def _print(x: Tensor) -> Tensor:
    """A few numbers that tell tensors apart: size, norm and projections, float64."""
    flat = x.detach().double().nan_to_num(posinf=1e300, neginf=-1e300).clamp(-1e30, 1e30).flatten()
    along = torch.arange(flat.numel(), dtype=torch.float64, device=flat.device)
    parts = [flat.norm(), *(flat @ (along * k).cos() for k in (1.0, 1.7))]
    return torch.stack([torch.full_like(flat[:1].sum(), flat.numel()), *parts]).cpu()


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    if len(a) != len(b):
        return False
    return all(
        bool(x[0] == y[0]) and bool((x - y).abs().max() <= _ROUNDING * y[1].clamp(min=1e-30))
        for x, y in zip(a, b, strict=True)
    )
