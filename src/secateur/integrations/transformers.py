"""A callback of transformers' `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from secateur.core.digest import state_digest
from secateur.core.errors import ArtifactError, MaskError, ScheduleError
from secateur.training.attach import Attached
from secateur.training.method import Method
from secateur.training.state_file import load_state, save_state

STATE = "secateur_training.safetensors"
_WEIGHTS = "weights"  # in it: the digest of those that it belongs to


class PruneCallback(TrainerCallback):
    """Prune while `Trainer` trains.

        gmp = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.9, begin=100, end=900))
        Trainer(model, arguments, ..., callbacks=[PruneCallback(gmp)]).train()

    Every checkpoint holds the method's state beside the optimizer's, and `train(resume_from_checkpoint=True)`
    goes on from it; a checkpoint that is named lies in `output_dir`. Steps are those of the optimizer:
    gradient accumulation and steps that mixed precision skips do not count.

    Raises:
        ScheduleError: the schedule ends after the last step of the training.
        ArtifactError: a checkpoint to resume from has no such state, or one of other weights.
        MaskError: at the end, a removed weight is not zero.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._attached: Attached | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self._resume(_folder(args, state) / STATE)
        if state.max_steps < self.method.end:
            raise ScheduleError(
                f"The schedule ends at step {self.method.end}, but training takes {state.max_steps} steps: "
                "the final masks would not be reached."
            )
        self._attached = self.method.attach(kwargs["optimizer"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            save_state(self.method.state_dict() | {_WEIGHTS: self._weights()}, folder / STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attached is not None:
            self._attached.release()
            self._attached = None
        try:
            self.method.check()
        except MaskError as error:
            if not args.load_best_model_at_end:
                raise
            raise MaskError(
                f"load_best_model_at_end loaded {state.best_model_checkpoint}, from before the last weights "
                f"were removed ({error}). Choose the best model among those of the final sparsity: save and "
                f"evaluate from step {self.method.end} on, or leave load_best_model_at_end out."
            ) from None

    def _resume(self, file: Path) -> None:
        # The trainer does not say where the checkpoint is that it loaded the model from.
        saved = load_state(file)
        if saved.get(_WEIGHTS) != self._weights():
            raise ArtifactError(
                f"{file} is of other weights than those that training goes on with. A checkpoint is resumed "
                "from inside output_dir: let that be the folder that it lies in."
            )
        self.method.load_state_dict(saved)

    def _weights(self) -> str:
        return state_digest({t.name: t.weight for t in self.method.live.targets})


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
