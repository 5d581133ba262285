"""Stacks of blocks, found by watching one forward pass: no tables of names or architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from secateur.core.errors import SelectionError
from secateur.core.names import unwrap
from secateur.layers.watching import Call, watch
from secateur.measure import as_call


@dataclass(frozen=True)
class Block:
    """One child of a stack.

    Attributes:
        name: of the module, as `named_modules` says it.
        kind: name of its class.
        parameters: entries of its parameters.
        reason: why it cannot be dropped; None if it can.
    """

    name: str
    kind: str
    parameters: int
    reason: str | None = None


@dataclass(frozen=True)
class Stack:
    """A list of blocks through which one hidden state passes.

    Attributes:
        name: of the `nn.ModuleList` or `nn.Sequential`.
        blocks: all of its children, in order.
    """

    name: str
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def droppable(self) -> tuple[str, ...]:
        """Names of the blocks that can be dropped, in order."""
        return tuple(block.name for block in self.blocks if block.reason is None)


def stacks(model: nn.Module, example: Any) -> tuple[Stack, ...]:
    """Find the stacks of blocks that a model passes its hidden state through.

    A stack is an `nn.ModuleList` or `nn.Sequential`, its children of one class or of several, with at least
    one block that can be dropped. One forward pass in evaluation mode on the example tells. A block can be
    dropped if

    - it runs exactly once, in the order of the list, called from a line that also calls others of the list;
    - its hidden state (the first tensor that it receives and returns) keeps shape and dtype;
    - it receives just what the block before it returned, and the one after it what it returns;
    - no later block uses another tensor that it makes (T5: the position bias of the first block);
    - it has parts of its own: a lone `nn.Linear` or norm is a layer, not a block;
    - where its stack lies in a block of another stack, it adds to its hidden state: the residual blocks of a
      stage, but not the convolutions of a residual block.

    Blocks that cannot be dropped carry the reason. That dropping a block is the same as bypassing it is
    proven by `drop_layers_`, each time.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        example: a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Raises:
        SelectionError: there is no such stack; says what came closest and why it is none.

    >>> block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> encoder = torch.nn.TransformerEncoder(block, 3)
    >>> [stack] = stacks(encoder, torch.ones(1, 5, 8))
    >>> stack.droppable
    ('layers.0', 'layers.1', 'layers.2')
    """
    inner = unwrap(model)
    return require(inner, survey(inner, *as_call(example)))


def survey(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Stack, ...]:
    """All lists of at least two modules, with the reason for every child that cannot be dropped."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    calls = watch([module for _, module in lists], model, args, kwargs)
    homes = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    found: list[Stack] = []
    for (name, module), seen in zip(lists, calls, strict=True):
        inside = any(stack.droppable and name.startswith(f"{stack.name}.".lstrip(".")) for stack in found)
        found.append(Stack(name, tuple(_blocks(name, module, seen, homes, inside))))
    return tuple(found)


def _blocks(
    stack: str, module: nn.Module, calls: list[Call], homes: Counter[int], inside: bool
) -> Iterator[Block]:
    position = {id(child): i for i, child in enumerate(module.children())}
    ordered = [position[id(c.child)] for c in calls] == sorted({position[id(c.child)] for c in calls})
    apart = all(a.done < b.order for a, b in pairwise(calls))
    sites = Counter(c.site for c in calls)
    for key, child in module._modules.items():
        name = f"{stack}.{key}" if stack else key
        if child is None:
            yield Block(name, "None", 0, "empty")
            continue
        own = [i for i, c in enumerate(calls) if c.child is child]
        if not is_block(child):
            reason: str | None = f"a single {type(child).__name__}, not a block"
        elif len(own) != 1:
            reason = f"called {len(own)} times in a forward pass" if own else "not called on this example"
        elif homes[id(child)] > 1:
            reason = "registered in the model a second time"
        elif not (ordered and apart):
            reason = "the list does not run one after the other, in its order"
        else:
            reason = _unfit(calls, own[0], sites, inside)
        parameters = sum(p.numel() for p in child.parameters())
        yield Block(name, type(child).__name__, parameters, reason)


def _unfit(calls: list[Call], i: int, sites: Counter[tuple[CodeType, int]], inside: bool) -> str | None:
    """Why the block of call `i` cannot be dropped, judged by what flows through it."""
    call, after = calls[i], calls[i + 1] if i + 1 < len(calls) else None
    if call.main is None or call.output is None or call.shape is None:
        return "no tensor goes in, or none comes out"
    if call.shape != call.output.shape or call.main.dtype != call.output.dtype:
        old, new = ([*t] for t in (call.shape, call.output.shape))
        return f"changes the hidden state from {old} to {new}, {call.main.dtype} to {call.output.dtype}"
    if sites[call.site] == 1:
        return "called from a line of its own, by its position"
    if call.linked is False:
        return "does not receive what the block before it returns"
    if after is not None and not after.linked:
        return "what it returns is not what the next block receives"
    if any(t in later.given for later in calls[i + 1 :] for t in call.made):
        return "makes a tensor besides the hidden state that later blocks use"
    if inside and not call.residual:
        return "part of a block, and does not add to the hidden state"
    return None


def is_block(module: nn.Module) -> bool:
    """Whether a module has parts: children with parameters, or several matrices of its own."""
    parts = any(next(child.parameters(), None) is not None for child in module.children())
    return parts or sum(p.dim() > 1 for p in module.parameters(recurse=False)) > 1


def require(model: nn.Module, lists: Sequence[Stack]) -> tuple[Stack, ...]:
    """Those of the lists that are stacks; raise `SelectionError` if none is."""
    found = tuple(stack for stack in lists if stack.droppable)
    if found:
        return found
    blocks = [b for stack in lists for b in stack.blocks if not (b.reason or "").startswith("a single")]
    why = "; ".join(f"{b.name}: {b.reason}" for b in blocks[:3]) or "it has no list of at least two blocks"
    raise SelectionError(
        f"{type(model).__name__} has no stack of blocks to drop from: {why}. A stack is an nn.ModuleList or "
        "nn.Sequential that passes one hidden state from block to block."
    )
