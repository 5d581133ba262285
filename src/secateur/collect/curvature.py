"""Gradient and curvature of the mean loss over all data: one value for the whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.collect.batches import Batch, Loss, gradient, mean_loss
from secateur.core.errors import StatsError
from secateur.core.names import Target
from secateur.stats import ExactDiagonal, HutchinsonDiagonal

Weighted = Iterator[tuple[Tensor, int]]  # mean loss of a batch and the number of its examples


def mean_gradient(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Batch], loss: Loss | None
) -> list[Tensor]:
    """`dL/dw` of the mean loss over all examples, in each weight's own shape."""
    weights = [t.weight for t in targets]
    return _average(weights, _losses(model, batches, loss), lambda value: gradient(value, weights))


def hutchinson_diagonal(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    loss: Loss | None,
    how: HutchinsonDiagonal,
) -> list[Tensor]:
    """Mean of `v * (H v)`; the probes are drawn anew for each batch, so more batches mean more probes."""
    weights = [t.weight for t in targets]
    generator = torch.Generator().manual_seed(how.seed)

    def probe(value: Tensor) -> list[Tensor]:
        grads = gradient(value, weights, create_graph=True)
        total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        for _ in range(how.probes):
            signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
            for t, v, hv in zip(total, signs, _derivative(_dot(grads, signs), weights), strict=True):
                t.addcmul_(v, hv, value=1 / how.probes)
        return total

    with double_backward():
        return _average(weights, _losses(model, batches, loss), probe)


def exact_diagonal(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    loss: Loss | None,
    how: ExactDiagonal,
) -> list[Tensor]:
    """`d2L / dw_i2` one weight after the other: the reference for the estimators."""
    weights = [t.weight for t in targets]
    entries = sum(w.numel() for w in weights)
    if entries > how.limit:
        raise StatsError(
            f"The exact diagonal takes one backward pass a weight and {entries:,} are selected, above the "
            f"limit of {how.limit:,}: use HutchinsonDiagonal() or GradSquare(), or raise "
            "ExactDiagonal(limit=...)."
        )

    def diagonal(value: Tensor) -> list[Tensor]:
        out = []
        for w, g in zip(weights, gradient(value, weights, create_graph=True), strict=True):
            second = [_derivative(g_i, [w])[0].view(-1)[i] for i, g_i in enumerate(g.reshape(-1))]
            out.append(torch.stack(second).view_as(w))
        return out

    with double_backward():
        return _average(weights, _losses(model, batches, loss), diagonal)


def hessian_gradient(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    loss: Loss | None,
    temperature: float,
) -> list[Tensor]:
    """`H g`, with g the gradient over all batches held fixed and H summed over the batches."""
    weights = [t.weight for t in targets]

    def cooled() -> Weighted:
        for batch in batches:
            output = batch.forward(model)
            if temperature != 1:
                if not isinstance(output, Tensor) or loss is None:
                    raise StatsError(
                        "GraSP divides the logits by its temperature, so the model must return one tensor "
                        "and loss= must be given; or set GraSP(temperature=1)."
                    )
                output = output / temperature
            yield mean_loss(output, batch, loss), batch.size

    with double_backward():
        fixed = _average(weights, cooled(), lambda value: gradient(value, weights))
        return _average(
            weights,
            cooled(),
            lambda value: _derivative(_dot(gradient(value, weights, create_graph=True), fixed), weights),
        )


@contextmanager
def double_backward() -> Iterator[None]:
    """Attention in its plain form: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _losses(model: nn.Module, batches: Iterable[Batch], loss: Loss | None) -> Weighted:
    for batch in batches:
        yield mean_loss(batch.forward(model), batch, loss), batch.size


def _average(
    weights: Sequence[Tensor], losses: Weighted, measure: Callable[[Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """Mean of `measure(loss)` over batches, each weighing by its examples."""
    total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    examples = 0
    for value, n in losses:
        for t, part in zip(total, measure(value), strict=True):
            t.add_(part.detach(), alpha=n)
        examples += n
    return [t / examples for t in total]


def _derivative(value: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradient of a function of gradients; zero where the loss is linear. The graph is kept for the next."""
    if not value.requires_grad:
        return [torch.zeros_like(w) for w in weights]
    return torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True, materialize_grads=True)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
