"""The layer objective that solvers minimise, and the factorisations of its matrix, each computed once.

Shapes: O outputs, I inputs of a layer's matrix. H: Gram matrix of the inputs, `E[x x^T]`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.errors import NonFiniteError, SecateurError, StatsError

_RAISED = (1.0, 10.0, 100.0)  # factors of the damping that are tried, in float64 after float32
_PANEL = 256  # below this, a triangle is inverted by substitution


class Quadratic:
    r"""$f(W) = \mathrm{tr}\,(W - W_0) H (W - W_0)^T$ for every layer whose inputs have the Gram matrix $H$.

    One object serves all layers that share an input (query, key and value; gate and up): what is derived from
    $H$ does not depend on the weights.

    Args:
        gram: `E[x x^T]` `[inputs, inputs]`, or the sum over tokens: any positive multiple gives the same.
        damping: added to the diagonal, relative to its mean over inputs that are ever non-zero.

    Raises:
        NonFiniteError: NaN or infinity in the Gram matrix.
        StatsError: it is not square, or zero everywhere.
        SecateurError: negative damping.
    """

    def __init__(self, gram: Float[Tensor, "inputs _"], damping: float = 0.01) -> None:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise StatsError(f"A Gram matrix is square; got {tuple(gram.shape)}.")
        if not damping >= 0:
            raise SecateurError(
                f"damping=... is relative to the mean of the diagonal, at least 0; got {damping}."
            )
        diagonal = gram.diagonal()
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError(
                "The inputs of a layer hold NaN or infinity: look at the data and the layers before."
            )
        self.dead_I = diagonal <= 0
        live = ~self.dead_I
        if not bool(live.any()):
            raise StatsError(
                "The inputs of a layer are zero everywhere on this data, so nothing tells its weights apart."
            )
        self.damping = damping
        self.notes: list[str] = []
        self._gram = gram
        self._scale = float(diagonal[live].double().mean())
        if n := int(self.dead_I.count_nonzero()):
            self.notes.append(f"{n} of {len(diagonal)} inputs are zero on all data: their weights go first.")

    @property
    def inputs(self) -> int:
        """Columns of the weights."""
        return len(self._gram)

    @property
    def gram_II(self) -> Tensor:
        """The Gram matrix as it was given."""
        return self._gram

    @cached_property
    def undamped_II(self) -> Tensor:
        """H in float32, over the mean of its diagonal, so that numbers are of order one."""
        return (self._gram / self._scale).float()

    @cached_property
    def diagonal_I(self) -> Tensor:
        """Diagonal of the damped H, one for inputs that are always zero."""
        return (self.undamped_II.diagonal() + self.damping).masked_fill(self.dead_I, 1.0)

    @cached_property
    def H_II(self) -> Tensor:
        """H with the damping, in float32; ones on the diagonal for inputs that are always zero."""
        H = self.undamped_II.clone()
        H.diagonal().copy_(self.diagonal_I)
        return H

    @cached_property
    def root_I(self) -> Tensor:
        """Square root of the diagonal of H: scores $|W_{ij}|$ times it are Wanda's."""
        return self.diagonal_I.sqrt()

    @property
    def norms_I(self) -> Tensor:
        """Norms of the inputs, without damping, up to a factor."""
        return self.undamped_II.diagonal().clamp(min=0).sqrt()

    @cached_property
    def unit_II(self) -> Tensor:
        """H scaled to a diagonal of ones, for weights times `root_I`."""
        return self.H_II / self.root_I[:, None] / self.root_I

    @cached_property
    def upper_II(self) -> Tensor:
        """Upper triangle $U = R^{-1}$ with $H^{-1} = U^T U$.

        Row j holds, from the diagonal on, what the removal of input j does to the inputs after it when those
        before it are fixed.
        """
        return _inverse_lower(self.triangle_II.flip(0, 1)).flip(0, 1).contiguous()

    @cached_property
    def triangle_II(self) -> Tensor:
        """Upper triangle $R$ with $H = R R^T$, the Cholesky factor of H with inputs in reversed order."""
        for kind in (torch.float32, torch.float64):
            for raised in _RAISED if kind == torch.float64 else _RAISED[:1]:
                H = self.H_II.to(kind)
                H.diagonal().add_((raised - 1) * self.damping)
                L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
                if int(failed):
                    continue
                if raised > 1:
                    self.notes.append(
                        f"Damping was raised from {self.damping:g} to {raised * self.damping:g}: the inputs "
                        "depend on each other."
                    )
                return L.flip(0, 1).float().contiguous()
        raise NonFiniteError(
            f"The Gram matrix cannot be factorised with damping up to {_RAISED[-1] * self.damping:g}: use "
            "more data, or more damping."
        )

    def error(self, W_OI: Tensor, W0_OI: Tensor) -> float:
        """$f(W) / f(0)$ without damping: the share of the output's power that is lost."""
        return self._power(W_OI - W0_OI) / max(self._power(W0_OI), torch.finfo(torch.float64).tiny)

    def _power(self, W_OI: Tensor) -> float:
        W = W_OI.float()
        return float(((W @ self.undamped_II) * W).sum(dtype=torch.float64))


def _inverse_lower(L: Tensor) -> Tensor:
    """Inverse of a lower triangle, by halves: two products of half the size for each split."""
    n = len(L)
    if n <= _PANEL:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, eye, upper=False)
    half = n // 2
    out = torch.zeros_like(L)
    top, bottom = _inverse_lower(L[:half, :half]), _inverse_lower(L[half:, half:])
    out[:half, :half], out[half:, half:] = top, bottom
    out[half:, :half] = -(bottom @ (L[half:, :half] @ top))
    return out
