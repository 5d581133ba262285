"""Sums of products of a layer's inputs, in float32 on their own device.

Shapes: T tokens, I inputs of a row of the layer's matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import NonFiniteError
from secateur.stream import ranks


class Sums:
    r"""$\sum z z^T$ of the inputs $z$ of a layer, and $\sum x z^T$ with those of the dense model, $x$.

    A solver needs no mean: nothing is centred, and float32 is enough, since the damping is far above its
    rounding.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, z: Float[Tensor, "T I"], x: Float[Tensor, "T I"] | None = None) -> None:
        """Take in rows, and if given those of the dense model, token by token."""
        z = z.float()
        if self._gram is None:
            self._gram = z.new_zeros(z.shape[1], z.shape[1])
        self.tokens += len(z)
        self._gram.addmm_(z.T, z)
        if x is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._gram)
            self._cross.addmm_(x.float().T, z)

    def unpair(self) -> None:
        """Forget the dense model's rows: not all of them have one in the pruned model."""
        self._cross = None

    def all_reduce(self, inputs: int, device: torch.device) -> None:
        """Sums over all ranks; each must come here for the same layers in the same order."""
        if not ranks.several():
            return
        if self._gram is None:
            self._gram = torch.zeros(inputs, inputs, device=device)
        ranks.add_(self._gram)
        if ranks.any_(self._cross is not None):
            self._cross = torch.zeros_like(self._gram) if self._cross is None else self._cross
            ranks.add_(self._cross)
        self.tokens = ranks.total(self.tokens)

    @property
    def gram(self) -> Float[Tensor, "I I"]:
        """Mean of `z z^T` over tokens.

        Raises `NonFiniteError` for NaN or infinite inputs.
        """
        return self._mean(self._gram)

    @property
    def cross(self) -> Float[Tensor, "I I"] | None:
        """Mean of `x z^T`; None if the dense inputs were not given."""
        return None if self._cross is None else self._mean(self._cross)

    def _mean(self, sums: Tensor | None) -> Tensor:
        assert sums is not None and self.tokens
        mean = sums / self.tokens
        if not bool(torch.isfinite(mean).all()):
            raise NonFiniteError("its inputs are not finite: look for NaN or overflow in the data.")
        return mean
