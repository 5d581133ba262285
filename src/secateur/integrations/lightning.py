"""A callback of Lightning's `Trainer`."""

from __future__ import annotations

import math
from typing import Any

import lightning

from secateur.core.errors import ScheduleError
from secateur.training.attach import Attached
from secateur.training.method import Method


class PruneCallback(lightning.Callback):
    """Prune while Lightning trains.

        gmp = sc.Gradual(module.net, sc.Magnitude(), sc.cubic(0, 0.9, begin=100, end=900))
        lightning.Trainer(callbacks=[PruneCallback(gmp)], ...).fit(module, loader)

    The method's state is part of every checkpoint, and `fit(ckpt_path=...)` goes on from it. The module has
    one optimizer, or the one that trains the pruned weights is its first.

    Raises:
        ScheduleError: the schedule ends after the last step of the training.
        MaskError: at the end, a removed weight is not zero.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._attached: Attached | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.method.load_state_dict(state_dict)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps) and steps < self.method.end:
            raise ScheduleError(
                f"The schedule ends at step {self.method.end}, but training takes {steps} steps: the final "
                "masks would not be reached."
            )
        self._release()
        self._attached = self.method.attach(trainer.optimizers[0])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._release()
        self.method.check()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._attached is not None:
            self._attached.release()
            self._attached = None
