"""Least squares for the weights that are left when inputs of a layer are removed.

Shapes: O outputs, I inputs of the matrix, K kept inputs. x: inputs in the dense model; z: kept inputs in the
pruned one, which may have changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import MaskError, NonFiniteError, SecateurError
from secateur.core.layout import Layout, Plain
from secateur.reconstruct.moments import CrossMoments, Moments

_DAMPINGS = (1.0, 10.0, 100.0, 1e3, 1e4)  # factors that are tried on data held out


@dataclass(frozen=True, eq=False)
class Reconstructed:
    r"""A layer's weight fitted to the inputs that are kept.

    Errors are $E\lVert y - y' \rVert^2 / E\lVert y \rVert^2$, with $y$ the dense layer's output (bias
    included) and $y'$ that of the layer without the removed inputs.

    Attributes:
        weight: in the shape and type of the original, zero where an input is removed.
        bias: with what the means of the removed inputs gave; None if there was none.
        error_before: with the original weights, the removed ones zero.
        error_bias: with the original weights and the new bias that suits them (plain removal without a bias).
        error_after: with `weight` and `bias`, in their own precision.
        damping: what was used, relative to the mean of the diagonal; infinity for the original weights.
        held_out: error on one half of the data of what the other half gives; None without halves.
        notes: what a reader must know.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error_bias: float
    error_after: float
    damping: float
    held_out: float | None
    notes: tuple[str, ...]


@torch.no_grad()
def reconstruct(
    weight: Float[Tensor, "..."],
    bias: Float[Tensor, " out"] | None,
    keep: Bool[Tensor, " features"],
    moments: Moments | CrossMoments,
    layout: Layout | None = None,
    damping: float = 1e-4,
    rows: Bool[Tensor, " out"] | None = None,
    halves: tuple[Moments, Moments] | tuple[CrossMoments, CrossMoments] | None = None,
) -> Reconstructed:
    r"""Weights on the kept inputs, and a bias, whose output is nearest to the dense layer's.

    $$ \min_{V, c} E\lVert W x + b - V z - c \rVert^2 + \lambda \lVert V - W_K \rVert^2 $$
    $$ V = W_K + (W A - W_K B) (B + \lambda I)^{-1}, \qquad c = b + W E[x] - V E[z] $$

    with $A = \mathrm{Cov}(x, z)$ and $B = \mathrm{Cov}(z, z)$; without a bias $c$ is absent and $A$, $B$ are
    the second moments. In `Moments` $z$ is $x_K$. Everything is float64; the weight is cast back before the
    bias is fitted and errors are taken. Of plain removal, the new bias alone and both, the best is returned;
    with `halves` the one, and the damping, that does best on one half of the data when fitted to the other.

    Args:
        weight: as stored: `[out, in]`, `[in, out]` for `Transposed`, `[out, in, *kernel]` for `Convolution`.
        bias: of the outputs; None fits no constant, for none can be added.
        keep: True for input features that stay; channels of a convolution, with all their taps.
        moments: of the inputs of the layer's matrix; `CrossMoments` if the inputs have changed.
        layout: how the weight is seen as a matrix; `Plain()` if None.
        damping: $\lambda$ over the mean of the diagonal of $B$; raised, with a note, if $B + \lambda I$
            cannot be factorised.
        rows: outputs that errors are taken over, those that will stay; all if None.
        halves: moments of two halves of the data, by which `damping` times 1, 10, 100, ... is chosen.

    Raises:
        MaskError: a mask or moments that do not fit the weight.
        NonFiniteError: NaN or infinity in the weight or the moments.
        SecateurError: negative damping.

    Source: least squares on kept channels as in He et al. 2017, Channel pruning for accelerating very deep
    neural networks, equation 5; the bias alone is that of FLAP (An et al. 2023). Differs from the papers: the
    ridge draws to the original weights, not to zero, so that it never costs accuracy to keep everything.

    >>> x = torch.randn(100, 3)
    >>> x[:, 2] = x[:, 0]
    >>> keep = torch.tensor([True, True, False])
    >>> found = reconstruct(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1), keep, Moments.of(x))
    >>> found.weight.round(decimals=2)
    tensor([[4., 2., 0.]])
    """
    layout = layout or Plain()
    matrix = layout.matrix(weight)
    features = layout.run(weight.shape)
    if tuple(keep.shape) != (features,):
        raise MaskError(f"keep=... has one entry for each of {features} features; got {tuple(keep.shape)}.")
    # Kernel taps lie outside and channels inside.
    columns = keep.repeat(matrix.shape[1] // features)
    fit = _Fit.of(matrix, bias, columns, moments, rows)
    if not 0 <= damping < float("inf"):
        raise SecateurError(
            f"damping=... is relative to the mean of the diagonal and at least 0; got {damping}."
        )
    count = moments.dense.count if isinstance(moments, CrossMoments) else moments.count
    notes = _notes(bias, count, fit)
    held_out, refit = None, True
    if halves is not None and not bool(keep.all()):
        first, second = (_Fit.of(matrix, bias, columns, half, rows) for half in halves)
        damping, held_out, refit = _choose(first, second, damping)
    plain = _Try.of(fit, fit.W_OK, fit.bias_O)
    with_bias = _Try.of(fit, fit.W_OK, fit.bias(fit.W_OK))
    best, used = min((with_bias, plain) if refit else (plain,), key=_Try.rank), damping
    if damping < math.inf:
        solved, used = fit.weights(damping, notes)
        solved = solved.to(weight.dtype).double()
        after = _Try.of(fit, solved, fit.bias(solved))
        # Worse through rounding, or through a system so ill-conditioned that the solution is noise.
        best = min((after, best), key=_Try.rank)
        if best is not after and not bool(fit.keep.all()):
            notes.append(
                f"Least squares gained nothing (error {after.error:.3g}): the weights are as before."
            )
    else:
        notes.append("Least squares gained nothing on data held out: the weights are as before.")
    full = torch.zeros_like(fit.W_OI)
    full[:, fit.keep] = best.V_OK
    return Reconstructed(
        layout.restore(full.to(weight), weight.shape),
        None if bias is None or best.bias_O is None else best.bias_O.to(bias),
        plain.error,
        with_bias.error,
        best.error,
        used,
        held_out,
        tuple(notes),
    )


def _choose(first: _Fit, second: _Fit, damping: float) -> tuple[float, float, bool]:
    """Damping that is best on `second` when fitted to `first`, its error there, and whether the bias is new.

    Infinite damping stands for the original weights.
    """
    tries = [(math.inf, _Try.of(second, first.W_OK, c)) for c in (first.bias_O, first.bias(first.W_OK))]
    for tried in dict.fromkeys(damping * factor for factor in _DAMPINGS):
        V_OK, used = first.weights(tried, [])
        tries.append((used, _Try.of(second, V_OK, first.bias(V_OK))))
    best = min(range(len(tries)), key=lambda i: tries[i][1].rank())
    return tries[best][0], tries[best][1].error, best > 0


@dataclass(frozen=True, eq=False)
class _Try:
    """Weights on the kept inputs, the bias with them, and the error that they make."""

    V_OK: Tensor
    bias_O: Tensor | None
    error: float

    @classmethod
    def of(cls, fit: _Fit, V_OK: Tensor, bias_O: Tensor | None) -> _Try:
        return cls(V_OK, bias_O, fit.error(V_OK, bias_O))

    def rank(self) -> float:
        return float("inf") if math.isnan(self.error) else self.error


@dataclass(frozen=True, eq=False)
class _Fit:
    """The least squares problem of one layer, in float64."""

    W_OI: Tensor
    bias_O: Tensor | None
    bias_dtype: torch.dtype
    keep: Tensor  # columns
    A_IK: Tensor  # covariance of x and z
    B_KK: Tensor  # covariance of z
    mean_I: Tensor
    mean_K: Tensor
    power_O: Tensor  # variance of the dense output
    rows: Tensor

    @classmethod
    def of(
        cls,
        W: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        moments: Moments | CrossMoments,
        rows: Tensor | None,
    ) -> _Fit:
        both = moments if isinstance(moments, CrossMoments) else CrossMoments.same(moments)
        inputs, device = W.shape[1], both.dense.mean.device
        if both.dense.mean.shape != (inputs,):
            raise MaskError(
                f"The moments are of {both.dense.mean.numel()} inputs, but the weight's matrix has {inputs}: "
                "pass the layout of the layer, and moments measured at it."
            )
        kept = kept.to(device)
        W = W.detach().to(device, torch.float64)
        rows = torch.ones(len(W), dtype=torch.bool) if rows is None else rows
        for what, t in (("rows=...", rows), ("the bias", bias)):
            if t is not None and t.shape != (len(W),):
                raise MaskError(f"{what} has one entry for each of {len(W)} outputs; got {tuple(t.shape)}.")
        fit = cls(
            W,
            None if bias is None else bias.detach().to(device, torch.float64),
            torch.float64 if bias is None else bias.dtype,
            kept,
            both.cross[:, kept],
            both.pruned.covariance[kept][:, kept],
            both.dense.mean,
            both.pruned.mean[kept],
            ((W @ both.dense.covariance) * W).sum(1),
            rows.to(device),
        )
        # A NaN anywhere in the moments is one in these sums; removed inputs of the pruned model play no part.
        for what, t in (
            ("weight", W),
            ("moments", fit.power_O),
            ("moments", fit.A_IK),
            ("moments", fit.B_KK),
        ):
            if not bool(torch.isfinite(t).all()):
                raise NonFiniteError(
                    f"The {what} of a layer to reconstruct hold NaN or infinity: look at the data."
                )
        return fit

    @property
    def W_OK(self) -> Tensor:
        return self.W_OI[:, self.keep]

    def weights(self, damping: float, notes: list[str]) -> tuple[Tensor, float]:
        """The solution `[O, K]`, and the damping with which it was found."""
        A, B = self.A_IK, self.B_KK
        if self.bias_O is None:  # no constant absorbs the means
            A = A + torch.outer(self.mean_I, self.mean_K)
            B = B + torch.outer(self.mean_K, self.mean_K)
        scale = float(B.diagonal().mean()) if B.numel() else 0.0
        if scale == 0:
            if B.numel():
                notes.append("The kept inputs are constant on this data, so the weights stay as they were.")
            return self.W_OK, damping
        # W A - W_K B, arranged such that it is exactly zero where nothing was removed or has changed.
        gone = ~self.keep
        right = self.W_OI[:, gone] @ A[gone] + self.W_OK @ (A[self.keep] - B)
        factor, used = _factor(B, scale, damping, notes)
        return self.W_OK + torch.cholesky_solve(right.T, factor).T, used

    def bias(self, V_OK: Tensor) -> Tensor | None:
        """The best constant for these weights, as it will be stored."""
        if self.bias_O is None:
            return None
        exact = self.bias_O + (self.W_OI @ self.mean_I - V_OK @ self.mean_K)
        return exact.to(self.bias_dtype).double()

    def error(self, V_OK: Tensor, c_O: Tensor | None) -> float:
        """Relative squared error of the outputs."""
        dense_O = self.W_OI @ self.mean_I
        constant_O = dense_O - V_OK @ self.mean_K
        if self.bias_O is not None and c_O is not None:
            constant_O = constant_O + (self.bias_O - c_O)
            dense_O = dense_O + self.bias_O
        spread_O = (
            self.power_O - 2 * ((self.W_OI @ self.A_IK) * V_OK).sum(1) + ((V_OK @ self.B_KK) * V_OK).sum(1)
        )
        lost = float((spread_O.clamp(min=0) + constant_O.square())[self.rows].sum())
        whole = float((self.power_O + dense_O.square())[self.rows].sum())
        return lost / whole if whole > 0 else (float("inf") if lost > 0 else 0.0)


def _factor(B_KK: Tensor, scale: float, damping: float, notes: list[str]) -> tuple[Tensor, float]:
    """Cholesky factor of `B + damping * scale * I`, with more damping if it takes more."""
    used = damping
    while used <= 1e4:
        damped = B_KK.clone()
        damped.diagonal().add_(used * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            if used > damping:
                notes.append(
                    f"Damping was raised from {damping:g} to {used:g}: the kept inputs depend on each other."
                )
            return factor, used
        used = max(10 * used, 1e-10)
    raise NonFiniteError(
        "The covariance of the kept inputs cannot be factorised: look for overflow in the data."
    )


def _notes(bias: Tensor | None, count: int, fit: _Fit) -> list[str]:
    notes = []
    if bias is None and bool((~fit.keep).any()):
        notes.append("It has no bias, so the means of removed inputs are made up for by the weights alone.")
    if count <= int(fit.keep.sum()):
        notes.append(
            f"{count} tokens for {int(fit.keep.sum())} kept inputs fit this data only: use more of it."
        )
    return notes
