"""The inverse of the damped empirical Fisher matrix of one layer, in blocks along its diagonal.

Shapes: N entries of a layer, in blocks of B; the last block is filled up with entries whose weight and
gradients are zero, which touch no other. C blocks are worked on at a time, G units of U entries in a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.errors import NonFiniteError

_TOGETHER = 16  # gradients added at a time: the blocks are read and written once for all of them
_CHUNK = 1 << 20  # entries of the blocks that are factorised at a time
_RAISES = 8  # times that a block's damping may be raised tenfold


class InverseFisher:
    r"""What the inverse of $F = \lambda I + \frac1m \sum_i g_i g_i^T$ says about the weights of one layer.

    The matrix is cut to blocks of `block` consecutive entries. `add` every gradient, then `settle`, then ask.

    Memory: `block + 32` values of float32 an entry.

    Reference: Singh and Alistarh 2020, WoodFisher; Kurtic et al. 2022, The optimal BERT surgeon.
    Differs from the papers: the sum is what is kept, in float32, and a few blocks at a time are inverted in
    float64. In exact arithmetic that is the recursion of Woodbury,
    $F_n^{-1} = F_{n-1}^{-1} - F_{n-1}^{-1} g_n g_n^T F_{n-1}^{-1} / (m + g_n^T F_{n-1}^{-1} g_n)$,
    which starts at $I / \lambda$: in float32 the curvature of every direction that is not tiny is lost beside
    $1 / \lambda$, and the inverse no longer positive.
    """

    def __init__(self, entries: int, block: int, device: torch.device) -> None:
        self.entries, self.block = entries, max(1, min(block, entries))
        blocks = -(-entries // self.block)
        self.gradients = 0
        self._sum_bBB = torch.zeros(blocks, self.block, self.block, device=device)
        self._waiting: list[Tensor] = []
        self._damping_b = torch.zeros(blocks, dtype=torch.float64, device=device)

    def add(self, gradient: Float[Tensor, " N"]) -> None:
        """One more $g_i$. Entries of weights that are gone must be zero."""
        self._waiting.append(self._blocks(gradient.float()))
        self.gradients += 1
        if len(self._waiting) == min(_TOGETHER, self.block):
            self._flush()

    def settle(self, damping: float) -> tuple[int, float]:
        r"""Set $\lambda$ once all gradients are in. Returns how many blocks needed more, and the most needed.

        Rounding in float32 can leave directions without curvature below zero. Where a tenth of the damping
        does not make up for that, the block's damping is raised tenfold, up to eight times.

        Raises `NonFiniteError` if that is not enough.
        """
        self._flush()
        self._damping_b.fill_(damping)
        for at, F_CBB in self._chunks():
            for _ in range(_RAISES + 1):
                tenth_CBB = F_CBB.clone()
                tenth_CBB.diagonal(dim1=1, dim2=2).sub_(0.9 * self._damping_b[at, None])
                weak_C = torch.linalg.cholesky_ex(tenth_CBB).info != 0
                if not bool(weak_C.any()):
                    break
                more_C = 9 * self._damping_b[at] * weak_C
                F_CBB.diagonal(dim1=1, dim2=2).add_(more_C[:, None])
                self._damping_b[at] += more_C
            else:
                raise NonFiniteError(
                    f"a block of the Fisher matrix has no inverse, even with a damping of "
                    f"{float(self._damping_b[at].max()):g}: use a loss of smaller scale, or more damping."
                )
        raised = self._damping_b > damping
        return int(raised.count_nonzero()), float(self._damping_b.max())

    def inverse(self) -> Float[Tensor, "blocks B B"]:
        """All blocks of the inverse, in float64; the last one filled up. For small layers and for tests."""
        return torch.cat([_inverse(F_CBB) for _, F_CBB in self._chunks()])

    @property
    def idle(self) -> bool:
        """Whether all gradients were zero."""
        return not bool(self._sum_bBB.diagonal(dim1=1, dim2=2).any())

    def scores(self, weight: Float[Tensor, " N"], unit: int = 1) -> Float[Tensor, " units"]:
        r"""Loss that the removal of each unit of `unit` consecutive entries adds, the other weights adapting.

        $$ \rho_Q = \tfrac12 w_Q^T \left([F^{-1}]_{QQ}\right)^{-1} w_Q, \qquad
           \rho_q = \frac{w_q^2}{2 [F^{-1}]_{qq}} $$

        `unit` must divide the block.
        """
        W_bB = self._blocks(weight.double())
        found = []
        for at, F_CBB in self._chunks():
            inverse_CBB, W_CGU = _inverse(F_CBB), W_bB[at].unflatten(1, (-1, unit))
            if unit == 1:
                share_CGU = W_CGU / inverse_CBB.diagonal(dim1=1, dim2=2)[..., None]
            else:
                tiles = inverse_CBB.unflatten(2, (-1, unit)).unflatten(1, (-1, unit))
                inverse_CGUU = tiles.diagonal(dim1=1, dim2=3).movedim(3, 1)
                L_CGUU = torch.linalg.cholesky(inverse_CGUU)
                share_CGU = torch.cholesky_solve(W_CGU[..., None], L_CGUU)[..., 0]
            found.append((W_CGU * share_CGU).sum(2) / 2)
        return torch.cat(found).view(-1)[: self.entries // unit]

    def removed(self, weight: Float[Tensor, " N"], keep: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        r"""The weights once all of $Q$, those not kept, are removed at once, and the kept ones adapted to it.

        $$ \delta w = -[F^{-1}]_{:,Q} \left([F^{-1}]_{QQ}\right)^{-1} w_Q
           \quad\Longleftrightarrow\quad \delta w_K = [F_{KK}]^{-1} F_{KQ}\, w_Q $$

        The second form is computed, which inverts no inverse. Removed weights are exactly zero. Weights that
        were zero stay so if their gradients were: then $F$ does not couple them with others.
        """
        W_bB = self._blocks(weight.double())
        keep_bB = self._blocks(keep.double())
        out_bB = torch.empty_like(W_bB)
        for at, F_CBB in self._chunks():
            W_CB, keep_CB = W_bB[at], keep_bB[at]
            pull_CB = keep_CB * (F_CBB @ (W_CB * (1 - keep_CB))[..., None])[..., 0]
            # F on the kept entries, one on the diagonal for the others.
            F_CBB *= keep_CB[:, :, None] * keep_CB[:, None, :]
            F_CBB.diagonal(dim1=1, dim2=2).add_(1 - keep_CB)
            L_CBB = torch.linalg.cholesky(F_CBB)
            adapted_CB = W_CB + torch.cholesky_solve(pull_CB[..., None], L_CBB)[..., 0]
            out_bB[at] = adapted_CB.masked_fill(keep_CB == 0, 0)
        return out_bB.view(-1)[: self.entries].to(weight.dtype)

    def _blocks(self, flat: Float[Tensor, " N"]) -> Float[Tensor, "blocks B"]:
        missing = len(self._sum_bBB) * self.block - self.entries
        return torch.nn.functional.pad(flat, (0, missing)).view(-1, self.block)

    def _flush(self) -> None:
        if self._waiting:
            g_bBm = torch.stack(self._waiting, dim=2)
            self._sum_bBB.baddbmm_(g_bBm, g_bBm.mT)
            self._waiting.clear()

    def _chunks(self) -> Iterator[tuple[slice, Float[Tensor, "C B B"]]]:
        """The damped blocks, a few at a time, in float64; they may be written to."""
        step = max(1, _CHUNK // self.block**2)
        for start in range(0, len(self._sum_bBB), step):
            at = slice(start, start + step)
            F_CBB = self._sum_bBB[at].double() / max(1, self.gradients)
            F_CBB.diagonal(dim1=1, dim2=2).add_(self._damping_b[at, None])
            yield at, F_CBB


def _inverse(F_CBB: Float[Tensor, "C B B"]) -> Float[Tensor, "C B B"]:
    return torch.cholesky_inverse(torch.linalg.cholesky(F_CBB))
