"""Watching one forward pass: what each child of a list receives, returns and adds to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.layers.tensors import call, inference, main_input, main_output, tensors_in

_CALL = nn.Module.__call__.__code__.co_filename
_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass
class Call:
    """One call of a child: what went in and what came out."""

    child: nn.Module
    order: int
    site: tuple[CodeType, int]
    main: Tensor | None
    shape: torch.Size | None
    memory: tuple[int, int, int] | None
    given: dict[int, Tensor]
    linked: bool | None = None  # whether it received what the call before returned; None for the first
    residual: bool = False  # whether something was added to the hidden state that it received
    done: int = -1
    output: Tensor | None = None
    made: dict[int, Tensor] = field(default_factory=dict)  # tensors returned besides the hidden state


def watch(
    lists: list[nn.Module], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[list[Call]]:
    """The calls of the children of each list during one forward pass."""
    clock = count()
    calls: list[list[Call]] = [[] for _ in lists]
    handles = []
    try:
        for module, seen in zip(lists, calls, strict=True):
            for child in dict.fromkeys(module.children()):
                enter, leave = partial(_enter, seen, clock), partial(_leave, seen, clock)
                handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(child.register_forward_hook(leave))
        with inference(model), _Additions(calls):
            call(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Additions(TorchDispatchMode):
    """Notes the running calls whose hidden state is a summand."""

    supports_higher_order_operators = True

    def __init__(self, calls: list[list[Call]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADD:
            summands = {_memory(x) for x in args[:2] if isinstance(x, Tensor)}
            for seen in self.calls:
                if seen and seen[-1].done < 0 and seen[-1].memory in summands:
                    seen[-1].residual = True
        return func(*args, **(kwargs or {}))


def _memory(x: Tensor) -> tuple[int, int, int]:
    """Where the entries of a tensor lie; views of one another in other shapes agree."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel()


def _enter(
    seen: list[Call],
    clock: Iterator[int],
    child: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    main = main_input(args, kwargs)
    given = {id(t): t for t in tensors_in((args, kwargs))}
    shape, memory = (None, None) if main is None else (main.shape, _memory(main))
    call = Call(child, next(clock), _call_site(child), main, shape, memory, given)
    if seen:
        before = seen[-1].output
        # Compared now: later, either may have been changed in place.
        call.linked = main is not None and before is not None and (main is before or _equal(main, before))
    seen.append(call)


def _leave(
    seen: list[Call], clock: Iterator[int], child: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    call = next(c for c in reversed(seen) if c.child is child and c.done < 0)
    call.done, call.output = next(clock), main_output(output)
    call.made = {id(t): t for t in tensors_in(output) if t is not call.output and id(t) not in call.given}


def _call_site(child: nn.Module) -> tuple[CodeType, int]:
    """The instruction that calls `child`, outside of torch's and its own handling of calls."""
    frame = sys._getframe(1)
    reached = False
    while frame.f_back is not None:
        frame = frame.f_back
        handling = frame.f_code.co_filename == _CALL
        reached = reached or handling
        if reached and not handling and frame.f_locals.get("self") is not child:
            break
    return frame.f_code, frame.f_lasti


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
