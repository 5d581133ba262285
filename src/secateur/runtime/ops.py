"""The sparse product as an operator of torch, so that it can be compiled, exported and differentiated.

`torch.ops.secateur.linear(x, weight, plan, bias, rows, columns, group, switch)` is x[..., K] W' + bias.
`weight` and `plan` are the buffers of a `Packed` and a `Plan` (empty where there is none); from `switch`
tokens on the kernel for many tokens is used, which makes a plan for itself where there is none. Gradients
reach x, not the weight, through the dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from secateur.core.errors import ArtifactError, SecateurError
from secateur.runtime import native
from secateur.runtime.formats import Bitmask, Blocks, Indexed, Packed
from secateur.runtime.formats.blocks import ROWS as BLOCK
from secateur.runtime.formats.common import check_buffer
from secateur.runtime.plan import Plan

Calls = tuple[native.Call | None, native.Call | None]  # for few tokens, for many


def packed_of(weight: Sequence[Tensor], rows: int, columns: int, group: int) -> Packed:
    """The format whose buffers these are; `group` is what the format calls so, or 0."""
    shape = (rows, columns)
    if len(weight) == 3 and weight[0].dtype == torch.int16:
        return Blocks(shape, *weight) if group == BLOCK else Indexed(shape, *weight)
    if len(weight) in (3, 4) and weight[0].dtype == torch.uint8:
        scales = weight[3] if len(weight) == 4 else None
        return Bitmask(shape, weight[0], weight[1], weight[2], scales, group)
    first = weight[0].dtype if weight else "none"
    raise ArtifactError(f"{len(weight)} buffers of which the first is {first} are no weight.")


def calls_of(packed: Packed, plan: Plan | None) -> Calls:
    """Kernels for few and for many tokens; None where torch has to do it.

    That for many tokens has an `otherwise` for inputs of a type that its plan is not made for.
    """
    if native.library() is None or packed.values.device.type != "cpu":
        return None, None
    shape = (packed.shape[1], packed.shape[0])
    name, weight = native.weight(packed)
    few = native.Call(name, weight, *shape)
    unplanned = native.Call(f"{name}_many", weight, *shape)
    if plan is None or (plan.pairs and not native.pairs()):  # it was made on another processor
        return few, unplanned
    many = plan.call()
    many.keep, many.otherwise = plan, unplanned
    return few, many


def check_bias(bias: Tensor | None, rows: int, name: str = "the bias") -> None:
    """Raise `ArtifactError` unless a kernel can read the bias safely."""
    if bias is not None:
        check_buffer(name, "bias", bias, torch.float32, (rows,))


def multiply(x: Tensor, calls: Calls, packed: Packed, bias: Tensor | None, switch: int) -> Tensor:
    """x[..., K] W' + bias by the kernel for so many tokens, or by torch where there is none."""
    columns = packed.shape[1]
    if x.shape[-1] != columns:
        raise SecateurError(f"The layer takes {columns} inputs; got a tensor of shape {tuple(x.shape)}.")
    few, many = calls
    if few is None or x.device.type != "cpu":
        return _by_torch(x, packed, bias)
    # Every microsecond counts here: a small layer takes some tens of them.
    wide = x if x.dtype is torch.float32 or x.dtype is torch.bfloat16 else x.float()
    if not wide.is_contiguous():
        wide = wide.contiguous()
    tokens = x.numel() // columns
    call = few if many is None or tokens < switch else many
    if call.only is not None and wide.dtype is not call.only:
        call = call.otherwise
    y = call(wide, tokens, bias)
    return y if y.dtype is x.dtype else y.to(x.dtype)


def _by_torch(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if packed.values.device != x.device:
        raise SecateurError(f"The layer is on {packed.values.device}, its input on {x.device}.")
    dtype = torch.promote_types(x.dtype, torch.float32)  # as precise as the kernels
    return F.linear(x.to(dtype), packed.unpack(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


class _Checked:
    """Kernels of buffers that came through the operator, checked once as long as nobody writes to them."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[list[StorageWeakRef], Calls]] = {}

    def __call__(self, packed: Packed, weight: Sequence[Tensor], plan: Sequence[Tensor]) -> Calls:
        key: tuple[int, ...] = (*packed.shape, getattr(packed, "group", 0), len(plan))
        for tensor in (*weight, *plan):
            key += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.numel())
        found = self._found.get(key)
        if found is not None and not any(reference.expired() for reference in found[0]):
            return found[1]
        packed.check()
        # A plan is made anew rather than believed: checking one costs as much.
        made = None
        if plan and native.library() is not None:
            made = Plan.of(packed, plan[2].dtype == torch.int32 and native.pairs())
        calls = calls_of(packed, made)
        self._found = {k: v for k, v in self._found.items() if not any(r.expired() for r in v[0])}
        self._found[key] = [StorageWeakRef(t.untyped_storage()) for t in (*weight, *plan)], calls
        return calls


_checked = _Checked()
_library = torch.library.Library("secateur", "DEF")
_library.define(
    "linear(Tensor x, Tensor[] weight, Tensor[] plan, Tensor? bias, int rows, int columns, int group, "
    "int switch) -> Tensor"
)
_library.define("dense(Tensor[] weight, int rows, int columns, int group, ScalarType dtype) -> Tensor")


def _linear(
    x: Tensor,
    weight: list[Tensor],
    plan: list[Tensor],
    bias: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    switch: int,
) -> Tensor:
    packed = packed_of(weight, rows, columns, group)
    check_bias(bias, rows)
    return multiply(x, _checked(packed, weight, plan), packed, bias, switch)


def _fake(
    x: Tensor, weight: Any, plan: Any, bias: Any, rows: int, columns: int, group: int, switch: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, plan, _, rows, columns, group, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.sizes, ctx.planned = (rows, columns, group), len(plan)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dense = torch.ops.secateur.dense(list(ctx.saved_tensors), *ctx.sizes, grad.dtype)
    nothing = [None] * len(ctx.saved_tensors), [None] * ctx.planned
    return grad @ dense, *nothing, None, None, None, None, None


def _dense(weight: list[Tensor], rows: int, columns: int, group: int, dtype: torch.dtype) -> Tensor:
    packed = packed_of(weight, rows, columns, group)
    packed.check()
    return packed.unpack(dtype)


def _fake_dense(weight: list[Tensor], rows: int, columns: int, group: int, dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty((rows, columns), dtype=dtype)


_library.impl("dense", _dense, "CPU")
torch.library.register_fake("secateur::dense", _fake_dense)
_library.impl("linear", _linear, "CPU")
torch.library.register_fake("secateur::linear", _fake)
torch.library.register_autograd("secateur::linear", _backward, setup_context=_setup)
