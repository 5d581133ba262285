"""Work shared by the processes of `torch.distributed`; in a single process each function does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.errors import SecateurError

T = TypeVar("T")


def started() -> bool:
    """Whether `torchrun` started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def start() -> Iterator[None]:
    """While this holds, the processes that `torchrun` started know of each other; for one alone, nothing."""
    if not started() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if several() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if several() else 1


@contextmanager
def _together() -> Iterator[None]:
    """One sentence where the others cannot be reached: the process that failed says itself why."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise SecateurError(f"Another process has ended, and its own message says why ({why}).") from None


def add_(x: Tensor) -> None:
    """Sum over all processes, in place: the same bits in each."""
    if several():
        with _together():
            dist.all_reduce(x)


def total(n: int) -> int:
    """Sum of a number over all processes."""
    if not several():
        return n
    x = torch.tensor([n], dtype=torch.int64)
    add_(x)
    return int(x)


def any_(flag: bool) -> bool:
    """Whether it holds in one of them."""
    return total(int(flag)) > 0


def gather(value: T) -> list[T]:
    """The value of each process, in their order; plain data only."""
    if not several():
        return [value]
    found: list[Any] = [None] * count()
    with _together():
        dist.all_gather_object(found, value)
    return found


def send_(x: Tensor, source: int) -> None:
    """Every process gets the tensor of one, in place."""
    if several():
        with _together():
            dist.broadcast(x, source)


def share(value: T, source: int) -> T:
    """Every process gets the value of one; plain data only."""
    if not several():
        return value
    found: list[Any] = [value]
    with _together():
        dist.broadcast_object_list(found, source)
    shared: T = found[0]
    return shared


def wait() -> None:
    """Until all processes have come here."""
    if several():
        with _together():
            dist.barrier()
