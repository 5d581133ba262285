"""Where the time of a forward pass goes, by operator, and why a smaller model is not faster by more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.core.modes import evaluation
from secateur.core.names import unwrap
from secateur.measure import Measurement, as_call

SHORT = 0.8
"""A fall of the time below this share of the fall of the multiply-accumulates is explained."""

_NOTABLE = 0.02  # fall of the multiply-accumulates below which noise decides
_DISTURBED = 0.1  # of the dense time, by which the time between operators may differ
_SLIGHT = 0.05  # of the dense time, below which a part is not named
# Kernels that hold matrix products and that the counter of floating-point operations has no formula for.
_FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
    "mkldnn_rnn_layer",
    "lstm",
    "gru",
    "linear",
}
_CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution"}
_BYTES = {"AVX512": 64, "AVX2": 32}  # of a vector register


@dataclass(frozen=True)
class OperatorTime:
    """One operator over a forward pass.

    Attributes:
        name: as torch calls it, such as "convolution".
        calls: in one pass.
        seconds: inside its kernels, in one pass.
        products: whether it multiplies matrices; convolutions, attention and recurrent layers do.
        uneven: calls with a size of the weight that is no multiple of the vector width; of a convolution, the
            output channels.
    """

    name: str
    calls: int
    seconds: float
    products: bool
    uneven: int


def operator_times(model: nn.Module, example: Any, *, runs: int = 3) -> tuple[OperatorTime, ...]:
    """Time every operator of a forward pass on the example input: medians of `runs` passes, longest first.

    What passes between operators, in Python and in the dispatcher, is not in it.
    """
    model = unwrap(model)
    args, kwargs = as_call(example)
    watch = _Watch(model)
    passes = []
    with evaluation(model), torch.no_grad():
        for _ in range(1 + runs):  # the first warms up
            watch.found = {}
            with watch:
                model(*args, **kwargs)
            passes.append(watch.found)
    last = passes[-1]
    times = (
        OperatorTime(
            name,
            last[name].calls,
            statistics.median(found[name].seconds for found in passes[1:] if name in found),
            last[name].products,
            last[name].uneven,
        )
        for name in last
    )
    return tuple(sorted(times, key=lambda t: -t.seconds))


@dataclass
class _Found:
    products: bool
    calls: int = 0
    seconds: float = 0.0
    uneven: int = 0


class _Watch(TorchDispatchMode):
    """Times operators while it holds."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.on_gpu = any(p.device.type == "cuda" for p in model.parameters())
        self.found: dict[str, _Found] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        packet = getattr(func, "overloadpacket", func)
        name = packet.__name__
        found = self.found.setdefault(name, _Found(packet in flop_registry or name in _FUSED))
        found.calls += 1
        found.seconds += seconds
        if found.products:
            found.uneven += self._uneven(name, args, out)
        return out

    def _uneven(self, name: str, args: tuple[Any, ...], out: Any) -> bool:
        weights = [t for t in args if isinstance(t, Tensor) and t.ndim >= 2 and self._is_weight(t)]
        if not weights:
            return False
        # Convolutions go over their inputs one by one; only what they put out is taken in blocks.
        sizes = (out.shape[1],) if name in _CONVOLUTIONS else weights[0].shape[:2]
        lanes = vector_width(weights[0])
        return any(size % lanes for size in sizes)

    def _is_weight(self, t: Tensor) -> bool:
        return t.numel() > 0 and t.untyped_storage().data_ptr() in self.weights


def vector_width(weight: Tensor) -> int:
    """Numbers of the type of `weight` that its device takes at once: sizes of this multiple waste nothing."""
    if weight.device.type == "cuda":
        return max(1, 16 // weight.element_size())
    return max(1, _BYTES.get(torch.backends.cpu.get_cpu_capability(), 16) // weight.element_size())


def why_not_faster(
    before: Measurement,
    after: Measurement,
    dense: Sequence[OperatorTime],
    smaller: Sequence[OperatorTime],
    width: int,
) -> str | None:
    """Why time fell by less than `SHORT` of what the multiply-accumulates did; None where it did not.

    Args:
        before: costs of the dense model, on the example input.
        after: costs of the smaller one.
        dense: its operators, of the dense model.
        smaller: and of the smaller one.
        width: the vector width of the machine.
    """
    if not (before.latency and after.latency and before.macs and after.macs is not None):
        return None
    whole = before.latency.median
    time_fell, macs_fell = _fall(whole, after.latency.median), _fall(before.macs, after.macs)
    if macs_fell < _NOTABLE or time_fell >= SHORT * macs_fell:
        return None
    text = f"The time {_moved(time_fell)} where the multiply-accumulates fell by {macs_fell:.0%}."
    old, new = _split(dense, whole), _split(smaller, after.latency.median)
    # The same Python runs for both models.
    if abs(new["between"] - old["between"]) > _DISTURBED * whole:
        return (
            f"{text} Inside operators it {_moved(_fall(_inside(dense), _inside(smaller)))}: other work on "
            "this machine disturbed the timing. Measure again when it is quiet."
        )
    parts = {
        "products of matrices, convolutions among them": "products",
        "other operators, which wait for memory": "others",
        "Python and the dispatcher, between operators": "between",
    }
    total = sum(old.values())
    where = "; ".join(
        f"{old[key] / total:.0%} in {what}, and there it {_moved(_fall(old[key], new[key]))}"
        for what, key in parts.items()
        if old[key] >= _SLIGHT * total
    )
    return f"{text} Of the dense time, {where}." + _unevenness(dense, smaller, width)


def _unevenness(dense: Sequence[OperatorTime], smaller: Sequence[OperatorTime], width: int) -> str:
    was, now = _uneven_calls(dense), _uneven_calls(smaller)
    if sum(now) <= sum(was):
        return ""
    what = ("convolutions do the work of the next multiple", "matrix products end in a slower remainder")
    blamed = [text for text, old, new in zip(what, was, now, strict=True) if new > old]
    of = sum(t.calls for t in smaller if t.products)
    return (
        f" {sum(now)} of {of} products (before: {sum(was)}) have a size that is no multiple of {width}, the "
        f"vector width here: {', '.join(blamed)}. multiple_of={width} aligns them."
    )


def _uneven_calls(times: Sequence[OperatorTime]) -> tuple[int, int]:
    """Those of convolutions and those of other products."""
    convolutions = sum(t.uneven for t in times if t.name in _CONVOLUTIONS)
    return convolutions, sum(t.uneven for t in times) - convolutions


def _split(times: Sequence[OperatorTime], whole: float) -> dict[str, float]:
    products = _inside([t for t in times if t.products])
    others = _inside(times) - products
    return {"products": products, "others": others, "between": max(0.0, whole - products - others)}


def _inside(times: Sequence[OperatorTime]) -> float:
    return sum(t.seconds for t in times)


def _fall(old: float, new: float) -> float:
    return 1 - new / old if old else 0.0


def _moved(fall: float) -> str:
    return f"fell by {fall:.0%}" if fall >= 0 else f"rose by {-fall:.0%}"
