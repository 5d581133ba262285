"""A pruned model with sparse layers wherever they are faster than the dense ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from rich.table import Table
from torch import Tensor, nn

from secateur.core.errors import SecateurError, SelectionError
from secateur.core.layout import is_hf_conv1d
from secateur.core.names import unwrap
from secateur.printing import printed
from secateur.progress import track
from secateur.runtime import native
from secateur.runtime.choose import Choice, choose, formats, paired
from secateur.runtime.formats.common import nbytes
from secateur.runtime.linear import SparseLinear

LEAST = 0.3  # sparsity below which no format can win
MARGIN = 1.05  # how much faster a layer has to be, so that noise does not decide
DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: of the module.
        shape: outputs and inputs.
        sparsity: fraction of zeros.
        format: "bitmask", "indexed" or "blocks", None where the layer stays dense; `reason` then says why.
        dtype: of the stored values.
        dense_bytes: of the dense weight.
        packed_bytes: of the packed weight, `dense_bytes` where it stays dense.
        plan_bytes: of the layout for many tokens that is kept beside it.
        speedup: dense time over sparse time, by tokens; empty where it was not measured.
        error: largest difference of a stored weight over the largest weight: 0 unless values are narrowed.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    format: str | None
    dtype: str
    dense_bytes: int
    packed_bytes: int
    plan_bytes: int
    speedup: Mapping[int, float]
    error: float
    reason: str


@dataclass(frozen=True)
class CompressReport:
    """What `compress_` did, and what it measured on this machine."""

    layers: tuple[LayerReport, ...]
    kernels: str
    threads: int

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """Layers that are sparse now."""
        return tuple(r for r in self.layers if r.format is not None)

    @property
    def dense_bytes(self) -> int:
        """Of all layers looked at, before."""
        return sum(r.dense_bytes for r in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Of all layers looked at, after, without plans."""
        return sum(r.packed_bytes for r in self.layers)

    @property
    def plan_bytes(self) -> int:
        """Of the layouts for many tokens that are kept beside the packed weights."""
        return sum(r.plan_bytes for r in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        layers = [vars(r) | {"speedup": {str(k): v for k, v in r.speedup.items()}} for r in self.layers]
        return {"kernels": self.kernels, "threads": self.threads, "layers": layers}

    def __str__(self) -> str:
        table = Table(title=f"Sparse layers: kernels {self.kernels}, {self.threads} threads")
        headings = ("layers", "shape", "sparsity", "stored as", "MB", "now", "times faster, at tokens")
        for heading in headings:
            wraps = heading in ("layers", "stored as")
            table.add_column(heading, overflow="fold", no_wrap=not wraps)
        for rows in _alike(self.layers):
            first = rows[0]
            names = first.name if len(rows) == 1 else f"{first.name} and {len(rows) - 1} more"
            low, high = min(r.sparsity for r in rows), max(r.sparsity for r in rows)
            sparsity = f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"
            stored = first.reason or f"{first.format}, {first.dtype}"
            faster = ", ".join(f"{v:.2f} at {k}" for k, v in first.speedup.items())
            before, now = sum(r.dense_bytes for r in rows), sum(r.packed_bytes + r.plan_bytes for r in rows)
            table.add_row(
                names, f"{first.shape[0]} x {first.shape[1]}", sparsity, stored, _mb(before), _mb(now), faster
            )
        plans = f", of them {_mb(self.plan_bytes)} MB for many tokens" if self.plan_bytes else ""
        total = (
            f"{len(self.converted)} of {len(self.layers)} layers are sparse; {_mb(self.dense_bytes)} MB of "
            f"weights are {_mb(self.packed_bytes + self.plan_bytes)} MB now{plans}.\n"
        )
        return printed(table, 118) + total


@dataclass(frozen=True)
class Candidate:
    """A layer that may become sparse; `stride` is that of a convolution."""

    name: str
    module: nn.Module
    weight: Tensor  # [N, K]
    bias: Tensor | None
    stride: tuple[int, int] | None


def compress_(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    tokens: Sequence[int] = (1, 64),
    memory: float = 1.25,
    measure: bool = True,
) -> CompressReport:
    """Replace layers by sparse ones, in place, wherever that is faster on this machine.

    Linear layers (GPT-2's transposed ones too) and convolutions with kernels of 1 x 1 are looked at. Each
    kind of layer (shape, type, sparsity) is timed once against the dense one, with weights coming from
    memory, for each of `tokens`; where it is less than 1.05 times as fast for any of them, the layer stays
    dense and the report says so. Layers with less than 30 % zeros stay dense untried, as do weights that
    several modules share.

    Args:
        model: pruned, on the CPU, in float32, bfloat16 or float16. Afterwards it is for inference only.
        dtype: of the stored values: bfloat16 or int8 (one scale for 128 weights) narrow them; the report
            has the error. None: the type of the weights; float32 for float16.
        tokens: how many tokens (positions of an image) will come at once. The default asks that both writing
            text and reading a prompt gain.
        memory: bytes that all layers together may take, over those of the dense ones. As long as it lasts,
            layers keep the layout for many tokens beside the packed weights; the others make it at each
            call, which pays from some hundred tokens on. The packed weights alone take 0.53 (float32) or
            0.56 (bfloat16) at 50 % sparsity, with the other layout 1.1 and 1.25.
        measure: False converts every layer with 30 % zeros as a bitmask, without timing it.

    Raises:
        SecateurError: bad settings, or a model that is not on the CPU.
        SelectionError: no layer to look at.
    """
    if not tokens or any(n < 1 for n in tokens):
        raise SecateurError(f"tokens=... are whole numbers from 1 on; got {list(tokens)}.")
    if not memory >= 0:
        raise SecateurError(f"memory=... is a fraction of the dense weights' bytes; got {memory}.")
    model = unwrap(model)
    found = (candidate(name, module) for name, module in model.named_modules())
    seen = [layer for layer in found if layer is not None]
    if not seen:
        raise SelectionError("The model has no linear layer and no convolution of 1 x 1.")
    # What is left for layouts for many tokens once every layer has what it cannot do without.
    left = 0.0
    for layer in seen:
        if layer.weight.device.type != "cpu":
            where = layer.weight.device
            raise SecateurError(f"{layer.name} is on {where}: move the model to the CPU first.")
        left += memory * _bytes(layer.weight) - _least(layer, dtype)
    known: dict[object, Choice | None] = {}
    reports, replaced = [], []
    for layer in track(seen, "measuring", len(seen)):
        report, sparse = _converted(layer, model, dtype, tuple(tokens), left, measure, known)
        left -= report.packed_bytes + report.plan_bytes - _least(layer, dtype)
        if sparse is not None:
            replaced.append((layer.name, sparse.train(layer.module.training)))
        reports.append(report)
    for name, sparse in replaced:  # at the end, so that an error leaves the model as it was
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse)
    return CompressReport(tuple(reports), native.kernels(), torch.get_num_threads())


def compress(model: nn.Module, **settings: Any) -> nn.Module:
    """A copy of the model with sparse layers; see `compress_`. Its `compress_report` says what was done."""
    fast = copy.deepcopy(unwrap(model))
    fast.compress_report = compress_(fast, **settings)  # type: ignore[assignment]
    return fast


def _converted(
    layer: Candidate,
    model: nn.Module,
    dtype: torch.dtype | None,
    tokens: tuple[int, ...],
    left: float,
    measure: bool,
    known: dict[object, Choice | None],
) -> tuple[LayerReport, SparseLinear | None]:
    weight = layer.weight
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    size = _bytes(weight)

    def dense(reason: str, speedup: Mapping[int, float] | None = None) -> tuple[LayerReport, None]:
        kind = str(weight.dtype).removeprefix("torch.")
        shape = (weight.shape[0], weight.shape[1])
        return LayerReport(
            layer.name, shape, sparsity, None, kind, size, size, 0, speedup or {}, 0.0, reason
        ), None

    reason = _refused(layer, model)
    if reason:
        return dense(reason)
    if sparsity < LEAST:
        return dense(f"less than {LEAST:.0%} zeros")
    stored = dtype or DTYPES[weight.dtype]
    plan = left >= _plan_bytes(weight, sparsity, stored)
    choice: Choice | None
    if not measure:
        choice = Choice("bitmask", stored, False, False, 16, {})
    else:
        tried = tuple(formats(weight, stored))
        key = (
            type(layer.module),
            weight.shape,
            weight.dtype,
            layer.stride,
            round(sparsity, 2),
            stored,
            plan,
            tried,
        )
        if key not in known:
            if native.library() is None:
                known[key] = None
            else:
                known[key] = choose(
                    layer.module,
                    weight,
                    layer.bias,
                    layer.stride,
                    dtype=stored,
                    tokens=tokens,
                    plan=plan,
                    tried=tried,
                )
        choice = known[key]
        if choice is None:
            return dense("no compiled kernels")
        speedup = {n: t.speedup for n, t in choice.times.items()}
        if min(speedup.values()) < MARGIN:
            return dense("dense is faster", speedup)
    sparse = choice.build(weight, layer.bias, layer.stride)
    packed = sparse.packed
    plan_bytes = 0 if sparse.plan is None else sparse.plan.nbytes
    largest = float(weight.abs().max())
    error = float((packed.unpack(weight.dtype) - weight).abs().max()) / largest if largest else 0.0
    report = LayerReport(
        layer.name,
        packed.shape,
        sparsity,
        choice.format,
        str(choice.dtype).removeprefix("torch."),
        size,
        nbytes(packed),
        plan_bytes,
        {n: t.speedup for n, t in choice.times.items()},
        error,
        "",
    )
    return report, sparse


def candidate(name: str, module: nn.Module) -> Candidate | None:
    """The layer, if it is one that a sparse one can stand for."""
    bias = getattr(module, "bias", None)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    if type(module) is nn.Linear:
        return Candidate(name, module, module.weight.detach(), bias, None)
    if is_hf_conv1d(module):
        weight: Tensor = module.weight.detach().T  # type: ignore[operator]
        return Candidate(name, module, weight, bias, None)
    if _is_pointwise(module):
        stride = (module.stride[0], module.stride[1])
        return Candidate(name, module, module.weight.detach().flatten(1), bias, stride)
    return None


def _is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d or module.kernel_size != (1, 1) or module.groups != 1:
        return False
    return module.padding in ((0, 0), "valid")


def _least(layer: Candidate, dtype: torch.dtype | None) -> float:
    """Bytes that the weight takes without a plan, about."""
    weight, kept = layer.weight, int(layer.weight.count_nonzero())
    if weight.dtype not in DTYPES or kept > (1 - LEAST) * weight.numel():
        return _bytes(weight)
    return weight.numel() / 8 + kept * (dtype or DTYPES[weight.dtype]).itemsize


def _plan_bytes(weight: Tensor, sparsity: float, stored: torch.dtype) -> float:
    """Bytes that a plan would take, about: values, and a byte for each column that one of two rows keeps."""
    if paired(weight.dtype, stored):
        return 1.05 * weight.numel() * ((1 - sparsity**2) * 2 + (1 - sparsity**4) / 4)
    value = 2 if stored == torch.bfloat16 else 4
    return 1.05 * weight.numel() * ((1 - sparsity) * value + (1 - sparsity**2) / 2)


def _refused(layer: Candidate, model: nn.Module) -> str:
    """Why this layer cannot be replaced; empty if it can."""
    if not layer.name:
        return "it is the whole model: put it into a module"
    if layer.weight.dtype not in DTYPES:
        return f"weights of {layer.weight.dtype}"
    module = layer.module
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight]
    if len(owners) > 1:
        other = next(n for n in owners if n != f"{layer.name}.weight")
        return f"shares its weight with {other.removesuffix('.weight')}"
    return ""


def _alike(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Layers that differ in name and a little in sparsity only."""
    groups: dict[object, list[LayerReport]] = {}
    for r in layers:
        key = (r.shape, r.format, r.dtype, r.reason, tuple(r.speedup.items()), bool(r.plan_bytes))
        groups.setdefault(key, []).append(r)
    return list(groups.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"
