"""The hooks that every method shares: what counts as a step, and steps that are left out."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.core.errors import MaskError
from secateur.training.live import LiveMasks
from secateur.training.optimizer_state import mixes_entries

Optimizer = torch.optim.Optimizer


@runtime_checkable
class Hooked(Protocol):
    """What is told of every step of an optimizer."""

    live: LiveMasks
    reads_gradients: bool

    def start(self) -> None:
        """Called once when it is attached, before the next step."""

    def before_step(self, optimizer: Optimizer) -> bool:
        """With the gradients that the step will use, reduced over ranks and unscaled; False leaves it out."""

    def after_step(self, optimizer: Optimizer) -> None:
        """After a step that was taken (or left out by `before_step`)."""

    def check(self) -> None:
        """Raise if it is not where it should be when training ends."""


class Attached:
    """A method at work on an optimizer, until released.

    As a context manager it ends with `check`, unless an exception is on its way: a schedule that training
    left unfinished raises. `release()` ends it without a check, for training that goes on another day.
    """

    def __init__(self, method: Hooked, optimizer: Optimizer, copies: Iterable[nn.Module] = ()) -> None:
        self._method = method
        optimizer = plain_optimizer(optimizer)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(t.module._parameters.get(t.attribute)) in trained for t in method.live.targets):
            raise MaskError(
                "The optimizer trains none of the weights to be pruned: is it the optimizer of this model?"
            )
        method.live.follow(copies)
        method.live.write()  # first: a method may start by showing weights that came back since a change
        method.start()
        method.live.write_copies()
        self._mixes = mixes_entries(optimizer)
        self._held_back: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def active(self) -> bool:
        """Whether it has not been released."""
        return bool(self._handles)

    def release(self) -> None:
        """Stop; weights and masks stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._put_back()  # a step that raised left them aside

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if error is None:
            self._method.check()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._ready(optimizer)
            return None
        ready = False

        def measured() -> Any:
            """The user's closure, which makes the gradients; Lightning always passes one."""
            nonlocal ready
            loss = closure()
            if not ready:
                ready = True
                self._ready(optimizer)
            elif self._method.reads_gradients:
                raise MaskError(
                    f"{type(optimizer).__name__} evaluates the loss several times in a step, where "
                    f"{type(self._method).__name__} reads its gradient once: use another optimizer."
                )
            elif self._mixes:
                self._method.live.write_gradients()
            return loss

        return (args[:1], {**kwargs, "closure": measured})

    def _ready(self, optimizer: Optimizer) -> None:
        """The gradients are those of the step."""
        if _overflowed(optimizer):
            return
        if not self._method.before_step(optimizer):
            # Optimizers pass over parameters without a gradient: no update, no decay, no momentum.
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._held_back.append((p, p.grad))
                        p.grad = None
        elif self._mixes:
            self._method.live.write_gradients()

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._put_back()
        if not _overflowed(optimizer):
            self._method.after_step(optimizer)

    def _put_back(self) -> None:
        for p, grad in self._held_back:
            p.grad = grad
        self._held_back = []


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers of training frameworks (accelerate's, Lightning's)."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MaskError(f"Masks are held by a torch optimizer; got {type(optimizer).__name__}.")
    return optimizer


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether an AMP scaler told a fused optimizer to do nothing: others it does not even call."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
