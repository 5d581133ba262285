"""Work shared by the processes of `torch.distributed`; in a single process each function does nothing."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if several() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if several() else 1


def add_(x: Tensor) -> None:
    """Sum over all processes, in place: the same bits in each."""
    if several():
        dist.all_reduce(x)


def total(n: int) -> int:
    """Sum of a number over all processes."""
    if not several():
        return n
    x = torch.tensor([n], dtype=torch.int64)
    dist.all_reduce(x)
    return int(x)


def any_(flag: bool) -> bool:
    """Whether it holds in one of them."""
    return total(int(flag)) > 0


def gather(value: T) -> list[T]:
    """The value of each process, in their order; plain data only."""
    if not several():
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def send_(x: Tensor, source: int) -> None:
    """Every process gets the tensor of one, in place."""
    if several():
        dist.broadcast(x, source)


def share(value: T, source: int) -> T:
    """Every process gets the value of one; plain data only."""
    if not several():
        return value
    found: list[Any] = [value]
    dist.broadcast_object_list(found, source)
    shared: T = found[0]
    return shared


def wait() -> None:
    """Until all processes have come here."""
    if several():
        dist.barrier()
