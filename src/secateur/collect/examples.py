"""Gradients of single examples, from one backward pass over a batch.

With the losses of single examples summed, the gradient that reaches a layer's output holds each example's own
in its own rows, and the gradient of the weight for one example is a product of its rows of inputs and of
output gradients (Goodfellow 2015, Efficient per-example gradient computations). That holds when examples do
not influence each other and lie along dimension 0. `disagreement` tests the first on two examples against
the definition; the second is tested in every batch. Where either fails, the definition is what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.collect import traffic
from secateur.collect.batches import Batch, Loss, example_losses, gradient
from secateur.collect.traffic import input_of, inputs_GNTI, outputs_GNTO, understood, with_examples
from secateur.collect.vectors import is_vector, vector_gradients
from secateur.core.names import Target
from secateur.stats import ExampleStat, Running

Sums = dict[str, dict[ExampleStat, Running]]


def measure_examples(
    model: nn.Module,
    targets: Sequence[Target],
    stats: Sequence[ExampleStat],
    batches: Iterable[Batch],
    loss: Loss | None,
) -> tuple[dict[str, dict[ExampleStat, Tensor]], str | None]:
    """Means over all examples, and the reason if some were taken one at a time that came together."""
    sums = _zero_sums(targets, stats)
    tried, reason = False, None
    for batch in batches:
        if batch.size > 1 and not tried:
            tried, reason = True, disagreement(model, targets, batch, loss)
        if batch.size > 1 and reason is None:
            assert loss is not None
            reason = batched(model, targets, batch, loss, sums)
            if reason is None:
                continue
        one_by_one(model, targets, batch, loss, sums)
    return {name: {s: running.mean() for s, running in of.items()} for name, of in sums.items()}, reason


def one_by_one(
    model: nn.Module, targets: Sequence[Target], batch: Batch, loss: Loss | None, sums: Sums
) -> None:
    """The definition: a backward pass for each example. Right for every model and every loss."""
    for i in range(batch.size):
        for target, grad in zip(targets, _alone(model, targets, batch, i, loss), strict=True):
            _add(sums, target, grad[None])


def batched(model: nn.Module, targets: Sequence[Target], batch: Batch, loss: Loss, sums: Sums) -> str | None:
    """The same from one backward pass, for linear and convolution layers, biases and norms.

    Returns None, or the reason why the batch's rows are not its examples; then nothing was added.
    """
    calls, stray = _tapped(model, targets, batch, loss)
    if stray is not None:
        return stray
    for target in targets:
        for grads in _blocks(target, calls.pop(id(target.weight)), batch.size):
            _add(sums, target, grads)
    return None


def disagreement(model: nn.Module, targets: Sequence[Target], batch: Batch, loss: Loss | None) -> str | None:
    """None if `batched` may be used, else the reason why not; tried on the first two examples."""
    if loss is None:
        return "the loss is computed inside the model"
    strange = [t.name for t in targets if not _is_known(t.module, t.attribute)]
    if strange:
        return f"{strange[0]} is not the weight of a linear or convolution layer, or a vector"
    pair = batch.part(0, 2)
    alone = [_alone(model, targets, pair, i, loss) for i in range(2)]
    try:
        calls, stray = _tapped(model, targets, pair, loss)
        found = [] if stray else [torch.cat([*_blocks(t, calls[id(t.weight)], 2)]) for t in targets]
    except Exception as error:  # the shortcut asks more of a model and a loss than the definition does
        return f"one backward pass over a batch failed ({error})"
    if stray is not None:
        return stray
    for target, fast, *expected in zip(targets, found, *alone, strict=True):
        right = torch.stack(expected)
        # Half precision disagrees by a few percent with itself when the batch size changes.
        tolerance = 1e-3 if target.weight.element_size() >= 4 else 5e-2
        # Norms in float64, where the squares of small gradients do not underflow.
        if not (fast - right).double().norm() <= tolerance * right.double().norm():
            return f"examples influence each other, or a weight is used outside its layer, at {target.name}"
    return None


def _is_known(module: nn.Module, attribute: str) -> bool:
    return understood(module, attribute) or is_vector(module, attribute)


_Call = tuple[nn.Module, str, Tensor, Tensor]  # a layer, its parameter, its input, the gradient of its output


def _zero_sums(targets: Sequence[Target], stats: Sequence[ExampleStat]) -> Sums:
    """Zero sums; the reduced shape is found by reducing an empty block."""
    sums: Sums = {}
    for target in targets:
        weight = target.matrix.float()
        sums[target.name] = {s: Running(torch.zeros_like(s.reduce(weight, weight[None][:0]))) for s in stats}
    return sums


def _add(sums: Sums, target: Target, grads: Float[Tensor, "n out in"]) -> None:
    weight = target.matrix.float()
    for stat, running in sums[target.name].items():
        running.add(stat.reduce(weight, grads), len(grads))


def _alone(
    model: nn.Module, targets: Sequence[Target], batch: Batch, i: int, loss: Loss | None
) -> list[Float[Tensor, "out in"]]:
    """Gradients of example `i`, run by itself."""
    batch = batch.part(i, i + 1)
    value = example_losses(batch.forward(model), batch, loss)[0]
    grads = gradient(value, [t.weight for t in targets])
    return [t.layout.matrix(g).float() for t, g in zip(targets, grads, strict=True)]


def _tapped(
    model: nn.Module, targets: Sequence[Target], batch: Batch, loss: Loss
) -> tuple[dict[int, list[_Call]], str | None]:
    """Every call of every layer in one pass forward and back; a reason if rows of one are not examples."""
    calls: dict[int, list[_Call]] = {id(t.weight): [] for t in targets}
    handles = [
        module.register_forward_hook(partial(_tap, calls[id(weight)], attribute), with_kwargs=True)
        for module in model.modules()
        for attribute, weight in module._parameters.items()
        if id(weight) in calls and _is_known(module, attribute)
    ]
    try:
        losses = example_losses(batch.forward(model), batch, loss)
        gradient(losses.sum(), [t.weight for t in targets])
    finally:
        for handle in handles:
            handle.remove()
    for target in targets:
        for module, _, x, g in calls[id(target.weight)]:
            if len(x) != batch.size or len(g) != batch.size or with_examples(module, x) is not x:
                return calls, f"the rows that reach {target.name} are not the examples of the batch"
    return calls, None


def _tap(
    store: list[_Call], attribute: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> None:
    """Keep the input of a call, and the gradient of its output once the backward pass brings it."""
    x = input_of(args, kwargs)
    if output.requires_grad:  # not where the model itself switches gradients off
        output.register_hook(lambda g: store.append((module, attribute, x, g.detach())))


def _blocks(target: Target, calls: Sequence[_Call], n: int) -> Iterator[Float[Tensor, "n out in"]]:
    """Per-example gradients of one layer, a few examples at a time; calls of a shared layer add up."""
    out, width = target.shape
    # Rows of the unfolded input of one example, over all groups.
    rows = [
        g[0].numel() // out * getattr(module, "groups", 1) if understood(module, attribute) else x[0].numel()
        for module, attribute, x, g in calls
    ]
    step = max(1, traffic.BLOCK // (width * max(out, *rows, 1)))
    for i in range(0, n, step):
        parts = []
        for module, attribute, x, g in calls:
            if not understood(module, attribute):
                flat = vector_gradients(module, attribute, x[i : i + step], g[i : i + step])
                parts.append(_as_matrices(target, flat))
                continue
            x_GNTI = inputs_GNTI(module, x[i : i + step].float())
            g_GNTO = outputs_GNTO(module, g[i : i + step].float())
            parts.append(torch.einsum("gnto,gnti->ngoi", g_GNTO, x_GNTI).reshape(-1, out, width))
        nothing = torch.zeros((), device=target.weight.device).expand(min(step, n - i), out, width)
        yield reduce(torch.add, parts) if parts else nothing


def _as_matrices(target: Target, flat: Float[Tensor, "n size"]) -> Float[Tensor, "n out in"]:
    """Rows in the order of the parameter's entries, as its matrix holds them."""
    order = target.layout.matrix(torch.arange(flat.shape[1], device=flat.device).view(target.weight.shape))
    return flat[:, order.flatten()].reshape(-1, *target.shape)
