"""What users pass as batches, in one form; examples cut out of batches; losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from secateur.core.errors import StatsError

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward pass and the target of its loss; tensors hold examples along dimension 0."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any

    @property
    def size(self) -> int:
        """Number of examples."""
        tensors = [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise StatsError("The inputs of a batch hold no tensor with a dimension of examples.")
        if tensors[0].shape[0] == 0:
            raise StatsError("A batch holds no examples: its first input has length 0.")
        return tensors[0].shape[0]

    def part(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop`."""
        n = self.size
        if isinstance(self.target, Tensor) and self.target.dim() and self.target.shape[0] != n:
            raise StatsError(
                f"A batch has {n} examples but a target of {self.target.shape[0]} rows: gradients of single "
                "examples need one row of the target for each."
            )
        return Batch(*(cut(x, n, start, stop) for x in (self.args, self.kwargs, self.target)))

    def forward(self, model: nn.Module) -> Any:
        """The model's output on this batch."""
        return model(*self.args, **self.kwargs)


def cut(tree: Any, n: int, start: int, stop: int) -> Any:
    """`tree` with every tensor of `n` rows cut to rows `start` to `stop`."""
    return tree_map(
        lambda t: t[start:stop] if isinstance(t, Tensor) and t.dim() and t.shape[0] == n else t, tree
    )


@dataclass(frozen=True)
class Batches:
    """Batches that can be read again, moved to the model's device as they are read.

    Each is one of: `(inputs, target)`, where inputs is a tensor, a tuple of positional or a mapping of
    keyword arguments; a mapping, which goes to the model as keyword arguments and to the loss as the
    target; a tensor, which has no target.
    """

    raw: Sequence[Any] | Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for item in self.raw:
            empty = False
            yield _batch(tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, _plain(item)))
        if empty:
            raise StatsError("No batches: batches=... is empty.")

    def __len__(self) -> int:
        return len(self.raw)  # type: ignore[arg-type]


def as_batches(batches: Iterable[Any] | None, device: torch.device, why: str) -> Batches:
    """`batches` in one form; a generator is read into memory, since most statistics read twice."""
    if batches is None:
        raise StatsError(f"{why}: pass batches=...")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise StatsError(
            f"batches=... is a list or loader of batches, not a single {kind}: wrap it in a list."
        )
    return Batches(list(batches) if isinstance(batches, Iterator) else batches, device)


def example_losses(output: Any, batch: Batch, loss: Loss | None) -> Tensor:
    """Losses of the single examples of a batch, `[n]`, each as if it were alone."""
    n = batch.size
    if n == 1:
        return mean_loss(output, batch, loss)[None]
    if loss is None:
        raise StatsError("A loss that the model computes itself covers the whole batch; pass one example.")
    each = [loss(cut(output, n, i, i + 1), cut(batch.target, n, i, i + 1)) for i in range(n)]
    return torch.stack([_scalar(x) for x in each])


def mean_loss(output: Any, batch: Batch, loss: Loss | None) -> Tensor:
    """Loss of a batch as a whole: `loss(output, target)`, or what the model put in `output.loss`."""
    if loss is not None:
        if batch.target is None:
            raise StatsError(
                "The batches hold inputs only, but a loss needs targets: pass pairs (inputs, target)."
            )
        return _scalar(loss(output, batch.target))
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(own, Tensor):
        raise StatsError(
            "This criterion needs a loss: pass loss=function(output, target), or batches with labels to a "
            "model that returns one."
        )
    return _scalar(own)


def gradient(value: Tensor, weights: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradient of a loss for each weight, zero for one that it does not depend on."""
    if not value.requires_grad:
        raise StatsError(
            "The loss does not depend on any weight: it was detached from the model's output, or computed "
            "with a function that has no gradient."
        )
    return torch.autograd.grad(
        value, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise StatsError(f"A loss is one number, the mean over the batch; loss(output, target) gave {got}.")
    return loss.reshape(())


def _plain(item: Any) -> Any:
    """Mappings of any class (such as a tokenizer's) as dictionaries, so that they can be traversed."""
    if isinstance(item, Mapping):
        return {k: _plain(v) for k, v in item.items()}
    if isinstance(item, tuple | list):
        return tuple(_plain(v) for v in item)
    return item


def _batch(item: Any) -> Batch:
    if isinstance(item, dict):
        return Batch((), item, item)
    if isinstance(item, Tensor):
        return Batch((item,), {}, None)
    if isinstance(item, tuple) and len(item) == 2:
        inputs, target = item
        if isinstance(inputs, dict):
            return Batch((), inputs, target)
        return Batch(inputs if isinstance(inputs, tuple) else (inputs,), {}, target)
    if isinstance(item, tuple) and len(item) == 1:  # a TensorDataset of inputs alone
        return _batch(item[0])
    raise StatsError(
        "A batch is (inputs, target), a mapping of keyword arguments or one tensor; got "
        f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, tuple) else ''}."
    )
