"""What a model costs: parameters, non-zeros, bytes, multiply-accumulates, time."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.core.bulk import count_nonzero
from secateur.core.errors import SecateurError
from secateur.core.modes import evaluation, unfused
from secateur.core.names import unwrap


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass: median and quartiles of `runs` timed passes, and the threads used."""

    median: float
    low: float
    high: float
    runs: int
    threads: int


@dataclass(frozen=True)
class Measurement:
    """Costs of a model.

    Attributes:
        parameters: distinct parameters (tied weights count once).
        nonzero: those that are not zero.
        dense_bytes: bytes of all distinct parameters and buffers as stored.
        packed_bytes: bytes with one bit a weight and the non-zero values of each tensor where that is less.
        macs: multiply-accumulates of one forward pass on the example input, None without one: those of matrix
            products and convolutions, attention in its plain form, padding included.
        effective_macs: the same without those on zero weights: what hardware that skips zeros would do.
        latency: of one forward pass on the example input, None without one. Dense kernels do not skip zeros.
    """

    parameters: int
    nonzero: int
    dense_bytes: int
    packed_bytes: int
    macs: int | None = None
    effective_macs: int | None = None
    latency: Latency | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that are zero."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(model: nn.Module, example: Any = None, *, runs: int = 10) -> Measurement:
    """Measure `model`, with time and multiply-accumulates if an example input is given.

    Args:
        model: any module.
        example: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        runs: timed forward passes, after two that are not counted.

    Raises:
        SecateurError: `runs` below 1.
    """
    if runs < 1:
        raise SecateurError(f"measure(runs=...) is at least 1; got {runs}.")
    model = unwrap(model)
    parameters = nonzero = dense = packed = 0
    for p in model.parameters():
        alive = count_nonzero(p)
        parameters += p.numel()
        nonzero += alive
        dense += p.numel() * p.element_size()
        packed += packed_size(p.numel(), alive, p.element_size())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    macs = effective = latency = None
    if example is not None:
        args, kwargs = as_call(example)
        macs, effective = _macs(model, args, kwargs)
        latency = _latency(model, args, kwargs, runs)
    return Measurement(parameters, nonzero, dense + buffers, packed + buffers, macs, effective, latency)


def packed_size(entries: int, nonzero: int, itemsize: int) -> int:
    """Bytes of one tensor as one bit a weight and its non-zero values, or dense if that is less."""
    return min(entries * itemsize, (entries + 7) // 8 + nonzero * itemsize)


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from an example input."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


class _Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products and convolutions while it holds."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.macs = 0
        self.effective = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", func)
        formula = flop_registry.get(packet)
        if formula is None and hasattr(func, "decompose"):
            with self:  # in inference mode, operators that consist of others arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=out) // 2
            self.macs += macs
            # Each entry of a weight takes part equally often, so work scales with the share that is not zero.
            factors = [t for t in args[packet in _WITH_SUMMAND :][:2] if self._is_weight(t)]
            self.effective += min((macs * count_nonzero(t) // t.numel() for t in factors), default=macs)
        return out

    def _is_weight(self, t: Any) -> bool:
        """Whether `t` is a parameter or a view of one; anything computed counts as an activation."""
        return isinstance(t, Tensor) and t.numel() > 0 and t.untyped_storage().data_ptr() in self.weights


_WITH_SUMMAND = (torch.ops.aten.addmm, torch.ops.aten.baddbmm)  # their first argument is no factor


def _macs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Multiply-accumulates in all, and without those on zero weights."""
    counter = _Counter(model)
    with evaluation(model), torch.no_grad(), _plain_kernels(), counter:
        model(*args, **kwargs)
    return counter.macs, counter.effective


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers as the matrix products that fused kernels hide from the counter."""
    with warnings.catch_warnings():
        # torch says so when a build without Intel GPUs is told to leave oneDNN out.
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with (
            unfused(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield


def _latency(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runs: int) -> Latency:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = []
    with evaluation(model), torch.no_grad():
        for _ in range(2 + runs):
            start = time.perf_counter()
            model(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    times = times[2:]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if runs > 1 else times * 3
    return Latency(statistics.median(times), low, high, runs, torch.get_num_threads())


def zeros(weight: Tensor) -> int:
    """Entries that are exactly zero."""
    return weight.numel() - count_nonzero(weight)
