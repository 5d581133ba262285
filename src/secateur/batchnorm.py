"""Normalisation statistics that fit a changed network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.collect.batches import as_batches
from secateur.core.errors import StatsError
from secateur.core.names import unwrap
from secateur.progress import track


def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Measure the running mean and variance of every batch normalisation anew, in place; no weight changes.

    Pruning changes the distribution of what each layer passes on, while batch normalisation still subtracts
    and divides by what the dense network had. In a network with batch normalisation that is much of the
    damage of one-shot pruning, and a few forward passes undo it. Statistics are the plain means over
    `batches`, of their means and unbiased variances, each with all layers before it using the batch's own.

    Args:
        model: any module; modes and momenta are left as they were.
        batches: training data in the forms that `collect` takes, some hundreds of examples in batches as
            large as in training; targets are ignored.

    Returns:
        The number of layers measured; 0 if the model has no batch normalisation with running statistics.

    Raises:
        StatsError: no batches, or a layer that no batch reaches; nothing is changed then.
    """
    model = unwrap(model)
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats
    }
    if not layers:
        return 0
    device = next(iter(model.parameters())).device
    data = as_batches(batches, device, "Normalisation statistics are measured on data")
    saved = {name: {k: b.clone() for k, b in m.named_buffers()} for name, m in layers.items()}
    momenta = {name: m.momentum for name, m in layers.items()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for m in layers.values():
            m.reset_running_stats()
            m.momentum = None  # a cumulative mean instead of an exponential one
            m.train()
        with torch.no_grad():
            for batch in track(data, "measuring normalisation"):
                batch.forward(model)
        for name, m in layers.items():
            if not int(m.num_batches_tracked or 0):
                raise StatsError(f"No batch reached {name}, so its statistics cannot be measured.")
    except BaseException:
        for name, m in layers.items():
            for key, buffer in m.named_buffers():
                buffer.copy_(saved[name][key])
        raise
    finally:
        for name, m in layers.items():
            m.momentum = momenta[name]
        for module, mode in modes:
            module.training = mode
    return len(layers)
