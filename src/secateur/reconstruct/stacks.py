"""Experts that one parameter holds as a stack, heard where the model multiplies with one of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.layout import layout_of, matrix_shape
from secateur.reconstruct.consumers import Consumer

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


def experts_of(name: str, path: str, module: nn.Module, attribute: str) -> tuple[Consumer, ...]:
    """A consumer for each expert of a stack."""
    weight = module._parameters[attribute]
    assert weight is not None
    layout = layout_of(module, attribute)
    inputs = matrix_shape(layout, weight.shape[1:])[1]
    return tuple(
        Consumer(f"{name}[{e}]", None, layout, inputs, inputs, (path,), (inputs, name, e), name, e)
        for e in range(len(weight))
    )


class _Products(TorchFunctionMode):
    """Sees products with a member of a stack."""

    def __init__(self, model: nn.Module, consumers: Sequence[Consumer], hear: Callable[..., None]) -> None:
        super().__init__()
        self._hear = hear
        self._stacks: dict[tuple[nn.Module, str], dict[int, Consumer]] = {}
        for c in consumers:
            module = model.get_submodule(c.holders[0])
            self._stacks.setdefault((module, c.parameter.rpartition(".")[2]), {})[c.expert] = c
        self._members: dict[int, tuple[weakref.ref[Tensor], Consumer, nn.Module]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func is F.linear or func in _PRODUCTS) and len(args) > 1:
            known = self._members.get(id(args[1]))
            if known is not None and known[0]() is args[1]:
                self._hear(known[1], known[2], args[0])
        result = func(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[0], nn.Parameter) and _is_number(args[1]):
            # Looked up now: the weights of a block come and go while this holds.
            for (module, key), experts in self._stacks.items():
                if module._parameters[key] is args[0] and int(args[1]) in experts:
                    self._members[id(result)] = weakref.ref(result), experts[int(args[1])], module
        return result


def _is_number(key: Any) -> bool:
    if isinstance(key, Tensor):
        return key.dim() == 0 and not key.is_floating_point() and key.dtype != torch.bool
    return isinstance(key, int) and not isinstance(key, bool)


@contextmanager
def hearing_experts(
    model: nn.Module, consumers: Iterable[Consumer], hear: Callable[..., None]
) -> Iterator[None]:
    """While this holds, `hear` gets the input of every product with one of these experts."""
    mine = [c for c in consumers if c.stack is not None]
    if not mine:
        yield
        return
    with _Products(model, mine, hear):
        yield
