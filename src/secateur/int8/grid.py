"""Symmetric grids with zero on them, whose points are numbers of the type that stores them.

The bits of a level and those of its scale together fill the significand of that type, so that the product of
both is exact, in whatever order it is computed, and the scale can be found again from the weights alone.

Shapes: O outputs, I inputs of a layer's matrix, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import NonFiniteError, SecateurError

_SIGNIFICAND = 24  # bits of a float32


@dataclass(frozen=True)
class Grid:
    """Which levels there are, and what shares a scale.

    Args:
        bits: of a level with its sign, from 2 to 8: from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
        group: inputs that share a scale; a whole row if None.

    Raises `SecateurError` for other numbers.
    """

    bits: int = 8
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SecateurError(f"bits=... is from 2 to 8; got {self.bits}.")
        if self.group is not None and self.group < 1:
            raise SecateurError(f"group=... is at least 1, or None for whole rows; got {self.group}.")

    @property
    def top(self) -> int:
        """The largest level."""
        return int(2 ** (self.bits - 1) - 1)

    def scale(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The smallest scale that takes in weights up to `largest`, and whose products `dtype` holds."""
        if not dtype.is_floating_point:
            raise SecateurError(f"dtype=... is a floating-point type, that of the model; got {dtype}.")
        kind = torch.finfo(dtype)
        bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, _SIGNIFICAND) - (self.bits - 1)
        # Multiples of a smaller one would fall between the subnormal numbers of the type.
        smallest = max(kind.smallest_normal * kind.eps * 2 ** (bits - 1), torch.finfo(torch.float32).tiny)
        return _significant(largest / self.top, bits, up=True).clamp(min=smallest)

    def nearest(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The points next to the weights; the last one for weights beyond it."""
        return (weight / scale).round_().clamp_(-self.top, self.top).mul_(scale)

    def grouped(self, W_OI: Tensor) -> Tensor:
        """`[out, groups, inputs of a group]`."""
        return W_OI.unflatten(1, (-1, self.group or W_OI.shape[1]))

    def check(self, weight: Tensor, name: str = "the weight") -> None:
        """Raise `SecateurError` if the group does not divide the inputs, `NonFiniteError` for NaN."""
        if self.group and weight.shape[1] % self.group:
            raise SecateurError(
                f"group={self.group} does not divide the {weight.shape[1]} inputs of {name}: take a divisor, "
                "or leave the layer out with where=Where(exclude=...)."
            )
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"No grid holds the NaN or infinity of {name}: look at its training.")


def scales_of(
    weight: Float[Tensor, "out in"], bits: int = 8, group: int | None = None
) -> Float[Tensor, "out groups"]:
    """The scales of weights on a grid: the largest ones of which the weights are whole multiples.

    Found from the weights alone, and exact: `weight / scale` is an integer of `bits` bits with its sign, and
    its product with the scale is the weight, without rounding. Where the levels of a group have a common
    divisor, the scale is that many times the one that they were made with. A group of zeros has scale 1.

    Args:
        weight: what `quantized`, `Quantized` or `quantize_` made, as a matrix.
        bits: of a level with its sign, from 2 to 8.
        group: inputs that share a scale; a whole row if None.

    Returns:
        float32 scales, one a row if `group` is None.

    Raises `SecateurError` if the weights are on no such grid.

    >>> scales_of(torch.tensor([[0.75, -0.5, 0.0], [0.0, 0.0, 0.0]]), bits=3)
    tensor([[0.2500],
            [1.0000]])
    """
    grid = Grid(bits, group)
    grid.check(weight)
    W_OGI = grid.grouped(weight.float())
    largest = W_OGI.abs().amax(-1, keepdim=True)
    # A power of two just below the largest weight: float32 weights are multiples of 2^-23 of it, or too many.
    unit = _significant(largest, 1, up=False).masked_fill(largest == 0, 1.0)
    whole = W_OGI / unit * 2 ** (_SIGNIFICAND - 1)
    divisor = _common_divisor(whole.int())
    is_whole = torch.equal(whole, whole.round()) and torch.equal(weight.float().to(weight.dtype), weight)
    if not is_whole or float((whole / divisor).abs().max()) > grid.top:
        kind = f"each {group} inputs" if group else "each row"
        raise SecateurError(
            f"The weights are on no grid of {bits} bits with one scale for {kind}: they were quantised with "
            "other settings, or stored in a narrower type since; see dtype=... of Quantized."
        )
    scale = divisor * 2.0 ** (1 - _SIGNIFICAND) * unit
    return scale.masked_fill(largest == 0, 1.0).squeeze(-1)


def precision(weight: Tensor) -> torch.dtype:
    """The narrowest type that holds the weights as they are."""
    narrow = (torch.bfloat16, torch.float16)
    fitting = (d for d in narrow if torch.equal(weight.to(d).to(weight.dtype), weight))
    return next(fitting, torch.float32)


def _significant(x: Tensor, bits: int, *, up: bool) -> Tensor:
    """Positive float32 numbers, rounded up or down to so many significant bits in their binary form."""
    dropped = 1 << (_SIGNIFICAND - bits)
    return ((x.view(torch.int32) + (dropped - 1 if up else 0)) & -dropped).view(torch.float32)


def _common_divisor(n: Tensor) -> Tensor:
    """Greatest common divisor along the last dimension, which stays; 1 where all are zero."""
    while n.shape[-1] > 1:
        half = (n.shape[-1] + 1) // 2
        n = torch.gcd(n[..., :half], F.pad(n[..., half:], (0, 2 * half - n.shape[-1])))
    return n.abs().clamp(min=1)
