"""The hidden state among the arguments and results of a block, and blocks that pass it on unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.core.modes import evaluation, unfused


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state that a block receives: its first tensor, by position or else by name."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def main_output(output: Any) -> Tensor | None:
    """The hidden state that a block returns: a tensor, or the first one of a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output
    return next((x for x in items if isinstance(x, Tensor)), None) if _is_items(output) else None


def with_main(output: Any, hidden: Tensor) -> Any:
    """`output` with `hidden` in the place of its hidden state."""
    if isinstance(output, Tensor):
        return hidden
    main = main_output(output)
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(key for key, value in output.items() if value is main)] = hidden
        return changed
    items = [hidden if x is main else x for x in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif _is_items(value):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


@contextmanager
def bypassed(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While this holds, the named blocks return the hidden state that they receive.

    They still compute, so whatever else they return (attention weights, a bias that is handed on) or write (a
    cache) is there as ever. A block that changes its input in place is bypassed all the same.
    """
    handles = []
    try:
        for name in names:
            waiting: list[Tensor] = []
            module = model.get_submodule(name)
            enter, leave = _bypass(waiting)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bypass(waiting: list[Tensor]) -> tuple[Any, Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = main_input(args, kwargs)
        assert x is not None
        waiting.append(x.clone())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_main(output, waiting.pop())

    return enter, leave


def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output on copies of its arguments, which it may change in place."""
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    return model(*args, **kwargs)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; torch's random state is put back, so equal runs draw alike."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with evaluation(model), torch.no_grad(), unfused(), torch.random.fork_rng([*devices]):
        yield


def _is_items(value: Any) -> bool:
    return isinstance(value, Mapping | tuple | list)
