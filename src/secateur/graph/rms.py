r"""Root-mean-square norms, told by what they compute.

Removing positions changes the mean of squares by a known factor, which the norm's weight and epsilon can
take up: such a removal is exact. Of D positions D' are left, and zeros stood elsewhere: m' = m D / D', so

$$ \frac{x}{\sqrt{m' + \epsilon D / D'}} \sqrt{D / D'} = \frac{x}{\sqrt{m + \epsilon}}. $$
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_TOLERANCE = 1e-4  # the norms compute in float32


@dataclass(frozen=True)
class RmsForm:
    """How a norm uses its weight: `x / rms(x) * (weight + offset)`.

    Attributes:
        weight: name of the parameter.
        offset: 0, or 1 where the weight is stored as a difference from one.
        epsilon: attribute that holds epsilon.
        value: of epsilon; None stands for the dtype's own.
    """

    weight: str
    offset: float
    epsilon: str
    value: float | None


def rms_form(module: nn.Module) -> RmsForm | None:
    """The form of a root-mean-square norm, None for any other module. Compared on random numbers."""
    parameters = [(n, p) for n, p in module._parameters.items() if p is not None]
    epsilon = next((n for n in _EPSILONS if isinstance(vars(module).get(n), float)), None)
    if len(parameters) != 1 or parameters[0][1].dim() != 1 or next(module.children(), None) is not None:
        return None
    if epsilon is None and vars(module).get("eps", 0) is not None:
        return None
    name, weight = parameters[0]
    probe = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    try:
        probe = probe.to_empty(device="cpu").float()
        w = torch.rand(weight.shape, generator=generator) + 0.5
        probe._parameters[name] = nn.Parameter(w)
        x = torch.randn(3, weight.shape[0], generator=generator)
        with torch.no_grad():
            found = probe(x)
    except Exception:  # it takes other arguments: not one of the norms meant here
        return None
    value = vars(module)[epsilon] if epsilon else torch.finfo(torch.float32).eps
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + value)
    for offset in (0.0, 1.0):
        if isinstance(found, torch.Tensor) and torch.allclose(
            found, plain * (w + offset), rtol=_TOLERANCE, atol=_TOLERANCE
        ):
            return RmsForm(name, offset, epsilon or "eps", vars(module)[epsilon] if epsilon else None)
    return None
