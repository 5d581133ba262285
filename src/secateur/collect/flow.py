"""Synaptic flow: the gradient of the summed outputs of the network with absolute weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from secateur.collect.batches import Batch, cut
from secateur.core.errors import StatsError
from secateur.core.names import Target

# They take mean and variance from what flows through them, so the flow is not conserved; that of a LayerNorm
# even sums to zero.
_DATA_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LocalResponseNorm,
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def synaptic_flow(model: nn.Module, targets: Sequence[Target], batch: Batch) -> list[Tensor]:
    """`dR/d|w|` for each target, float64, in each weight's own shape.

    The model itself is not touched: it is called with other tensors in place of its own.
    """
    args, kwargs = tree_map(_ones, cut((batch.args, batch.kwargs), batch.size, 0, 1))
    _refuse_norms(model)
    leaves: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in leaves:
            size = p.detach().double().abs()
            bias = "bias" in name.rpartition(".")[2]
            leaves[id(p)] = (torch.zeros_like(size) if bias else size).requires_grad_()
        tensors[name] = leaves[id(p)]
    for name, b in model.named_buffers():
        tensors[name] = _neutral(name, b)
    output = functional_call(model, tensors, args, kwargs)
    floats = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    if not floats:
        raise StatsError(
            f"SynFlow sums the model's outputs; a {type(output).__name__} holds no float tensor."
        )
    flow = torch.stack([t.double().sum() for t in floats]).sum()
    wanted = [leaves[id(t.weight)] for t in targets]
    return list(torch.autograd.grad(flow, wanted, allow_unused=True, materialize_grads=True))


def _refuse_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        batch_statistics = isinstance(module, _BATCH_NORMS) and module.running_mean is None
        if batch_statistics or isinstance(module, _DATA_NORMS):
            raise StatsError(
                f"SynFlow needs layers that conserve the flow, but {name} ({type(module).__name__}) "
                "normalises by the data that flows through it. Use another criterion."
            )


def _neutral(name: str, buffer: Tensor) -> Tensor:
    if name.endswith("running_mean"):
        return torch.zeros_like(buffer, dtype=torch.float64)
    if name.endswith("running_var"):
        return torch.ones_like(buffer, dtype=torch.float64)
    return buffer.double() if buffer.is_floating_point() else buffer


def _ones(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        raise StatsError(
            "SynFlow feeds an all-ones input through the network, which needs a floating-point input; this "
            "model takes integers (token ids). Use another criterion."
        )
    return torch.ones_like(x, dtype=torch.float64)
