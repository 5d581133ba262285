"""Layers that compute with packed weights, in the place of the dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import SecateurError
from secateur.runtime import native
from secateur.runtime.formats import Packed
from secateur.runtime.formats.common import kept
from secateur.runtime.ops import Calls, calls_of, check_bias, multiply, packed_of
from secateur.runtime.plan import Plan

NEVER = 2**31 - 1


class SparseLinear(nn.Module):
    """`nn.Linear` with a packed weight, for inference: gradients reach the input, not the weight.

    The buffers of the weight are part of the `state_dict`; the plan, which is derived from them, is not.
    Casting a model (`.half()`, `.to(dtype)`) leaves them as they are: results come in the type of the input.

    Args:
        packed: the weight [N, K].
        bias: [N], or None.
        plan: for many tokens; see `Plan`. Without one the kernel for many tokens makes one at each call.
        switch: tokens from which on the kernel for many tokens is used.
    """

    group: int
    bias: Tensor | None

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, plan: Plan | None = None, switch: int = NEVER
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise SecateurError(f"The bias has shape {tuple(bias.shape)} for {self.out_features} outputs.")
        self.group = getattr(packed, "group", 0)
        self._names = tuple(packed.buffers())
        for name, buffer in packed.buffers().items():
            self.register_buffer(name, buffer)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.switch = switch
        self.set_plan(plan)
        self._calls: tuple[tuple[tuple[int, int], ...], Calls, Packed] | None = None

    @property
    def packed(self) -> Packed:
        """The weight in its format."""
        buffers = [self.get_buffer(name) for name in self._names]
        return packed_of(buffers, self.out_features, self.in_features, self.group)

    @property
    def plan(self) -> Plan | None:
        """The layout for many tokens, if there is one."""
        return self._plan

    @property
    def weight(self) -> Tensor:
        """The dense weight, written out anew at each access."""
        return self.packed.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if _plain(x):
            calls, packed = self._kernels()
            return multiply(x, calls, packed, self._buffers["bias"], self.switch)
        weight = [self.get_buffer(name) for name in self._names]
        sizes = (self.out_features, self.in_features, self.group, self.switch)
        y: Tensor = torch.ops.secateur.linear(x, weight, self._plan_buffers, self.bias, *sizes)
        return y

    def extra_repr(self) -> str:
        density = kept(self.packed) / (self.in_features * self.out_features)
        kind = type(self.packed).__name__.lower()
        dtype = str(self.get_buffer("values").dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {kind}, {dtype}, sparsity={1 - density:.1%}"
        )

    def set_plan(self, plan: Plan | None) -> None:
        """Use this layout for many tokens, made from `packed`, or none."""
        self._plan = plan
        self._planned = tuple(_state(self._buffers[name]) for name in self._names)  # that it was made of
        self._plan_buffers = [] if plan is None else list(plan.buffers())

    def _kernels(self) -> tuple[Calls, Packed]:
        # Buffers move with load_state_dict(assign=True), deepcopy or to(), and anyone may write to them:
        # where they lie, and how often they were written to, is looked at each time.
        state = tuple(_state(self._buffers[name]) for name in self._names)
        bias = self._buffers["bias"]
        if bias is not None and bias.dtype is not torch.float32:
            check_bias(bias, self.out_features, type(self).__name__)  # it was assigned
        if self._calls is None or self._calls[0] != state:
            packed = self.packed
            packed.check(type(self).__name__)
            if self._plan is not None and self._planned != state:
                usable = native.library() is not None and packed.values.device.type == "cpu"
                pairs = self._plan.pairs and native.pairs()
                self.set_plan(Plan.of(packed, pairs) if usable else None)
            self._calls = (state, calls_of(packed, self._plan), packed)
        return self._calls[1:]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        self._calls = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_calls": None}


class SparseConv1x1(SparseLinear):
    """`nn.Conv2d` with kernels of 1 x 1, no padding and one group, by the same product.

    The channels come last in memory for the product; give `channels_last` tensors to spare the copies.
    """

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        plan: Plan | None = None,
        switch: int = NEVER,
        stride: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(packed, bias, plan, switch)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H, W] -> [B, N, H / stride, W / stride], channels last in memory."""
        if self.stride != (1, 1):
            x = x[..., :: self.stride[0], :: self.stride[1]]
        y = super().forward(x.movedim(-3, -1))
        return y.movedim(-1, -3)


def _state(buffer: Tensor | None) -> tuple[int, int]:
    """Where a buffer lies, and how often it was written to."""
    assert buffer is not None
    return buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version


def _plain(x: Tensor) -> bool:
    """Whether nobody watches: no compiler, tracer, mode or gradient, which all need the operator."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
    )


def dense_of(layer: SparseLinear) -> nn.Module:
    """The dense layer that a sparse one stands for, with the weight in its stored precision."""
    weight = layer.weight
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    if isinstance(layer, SparseConv1x1):
        made: nn.Module = nn.Conv2d(
            layer.in_features, layer.out_features, 1, layer.stride, bias=bias is not None, dtype=weight.dtype
        )
        weight = weight[..., None, None]
    else:
        made = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, dtype=weight.dtype)
    state = {"weight": weight} | ({} if bias is None else {"bias": bias})
    made.load_state_dict(state)
    return made.requires_grad_(False)
