"""What all methods share: masks, steps taken, history, and the state to go on from."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from secateur.core.errors import ArtifactError, MaskError, ScheduleError
from secateur.core.names import Selection, unwrap
from secateur.masks import Masks
from secateur.measure import measure, zeros
from secateur.record import Change, LayerRecord, Report
from secateur.training.attach import Attached, Optimizer
from secateur.training.live import LiveMasks


class CollapseWarning(UserWarning):
    """A layer has no weight left."""


class Method:
    """Pruning of one model while it trains: `Gradual`, `Movement`, `Dynamic` and the others are such.

    A method overrides `end`, `start`, `before_step` and `after_step`, and calls `_change` with new masks.
    """

    reads_gradients = False  # of the step, once: what an optimizer with several evaluations would confuse

    def __init__(self, model: nn.Module, selection: Selection, settings: Mapping[str, str]) -> None:
        self.model = unwrap(model)
        # Replicas that measure on data of their own would choose different masks.
        self._group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self.selection = selection
        self.settings = dict(settings)
        self.live = LiveMasks(selection.targets)
        self.step = 0
        self.history: tuple[Change, ...] = ()
        self._notes: dict[str, None] = {}  # in order, each once
        self._attached: Attached | None = None
        self._before = measure(self.model)
        self._started = time.perf_counter()

    @property
    def masks(self) -> Masks:
        """The present masks, a copy."""
        return self.live.masks

    def attach(
        self, optimizer: Optimizer, *, steps: int | None = None, copies: Iterable[nn.Module] = ()
    ) -> Attached:
        """Prune from now on as `optimizer` steps, until the end of the `with` block or `release()`.

        Args:
            optimizer: the one that trains the model.
            steps: optimizer steps that training will take in all; a schedule that ends later raises here.
            copies: averages of the model's weights (EMA, SWA), in which the zeros are made too.

        Raises:
            ScheduleError: training ends before the schedule does: here, by `steps`, or after the block.
            MaskError: the optimizer trains none of the weights, or the method is attached already; at the
                end, a removed weight is not zero.
        """
        if steps is not None and steps < self.end:
            raise ScheduleError(
                f"The schedule ends at step {self.end}, but training takes {steps} steps: the final masks "
                "would not be reached."
            )
        if self._attached is not None and self._attached.active:
            raise MaskError("This method is attached to an optimizer already: release() that first.")
        self._attached = Attached(self, optimizer, copies)
        return self._attached

    @property
    def end(self) -> int:
        """The step before which training may not end."""
        return 0

    def start(self) -> None:
        """Called when it is attached."""

    def before_step(self, optimizer: Optimizer) -> bool:
        """Called with the gradients of a step; False leaves the step out."""
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step."""
        self.step += 1
        self.live.write()

    def _change(self, keep: Mapping[str, Tensor], asked: float, step: int | None = None) -> None:
        """Take over new masks, in the shapes of the parameters, write them, and note it down."""
        keep = self._agreed(keep)
        moved = sum(int((keep[t.name] != self.live[t.name]).count_nonzero()) for t in self.live.targets)
        self.live.replace(keep)
        self.live.write()
        self.live.write_copies()
        removed = self.live.removed
        sizes = {t.name: t.weight.numel() for t in self.live.targets}
        layers = {name: n / sizes[name] for name, n in removed.items()}
        total = sum(removed.values()) / sum(sizes.values())
        self.history += (Change(self.step if step is None else step, asked, total, layers, moved),)
        self._look_for_collapse(removed, sizes)

    def check(self) -> None:
        """Raise unless the schedule has come to its end and every weight that is not kept is zero."""
        if self.step < self.end:
            raise ScheduleError(
                f"Training ended at step {self.step}, the schedule ends at {self.end}: the sparsity is "
                f"{self.masks.sparsity:.4f} and not the final one. Let the schedule end earlier, train "
                "longer, or release() what attach returned, to go on another day."
            )
        self.masks.check(self.model)

    def report(self) -> Report:
        """What happened so far."""
        asked = self.history[-1].layers if self.history else {}
        removed = self.live.removed
        records = tuple(
            LayerRecord(
                t.name, tuple(t.weight.shape), asked.get(t.name, 0.0), removed[t.name], zeros(t.weight)
            )
            for t in self.live.targets
        )
        note = "Zeros in dense tensors: files and dense kernels do not get smaller or faster by themselves."
        return Report(
            self.settings,
            records,
            self.selection.skipped,
            self._before,
            measure(self.model),
            (note, *self._notes),
            {"training": time.perf_counter() - self._started},
            self.masks,
            self.history,
        )

    def state_dict(self) -> dict[str, Any]:
        """What going on needs: tensors, and one text. `torch.load(weights_only=True)` reads it."""
        rest = {
            "step": self.step,
            "history": [c.to_dict() for c in self.history],
            "notes": list(self._notes),
            "settings": self.settings,
        }
        return {"masks": dict(self.masks), "rest": json.dumps(rest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; before `attach`.

        Raises:
            ArtifactError: it is no such state, or one of a method with other settings.
            MaskError: its masks are not those of this model.
        """
        try:
            rest, masks = json.loads(state["rest"]), dict(state["masks"])
            step, notes, settings = rest["step"], rest["notes"], rest["settings"]
            history = tuple(Change.from_dict(c) for c in rest["history"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"This is not the state of a method that prunes in training: {error}."
            ) from None
        if settings != self.settings:
            odd = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))[0]
            raise ArtifactError(
                f"The state is of a run with {odd} {settings.get(odd)}, not {self.settings.get(odd)}: go on "
                "with the settings that it was made with."
            )
        if masks.keys() != {t.name for t in self.live.targets}:
            odd = sorted(masks.keys() ^ {t.name for t in self.live.targets})[0]
            raise MaskError(f"The state covers other layers: only one of it and this method has {odd}.")
        self.live.replace(masks)
        self.step, self.history, self._notes = step, history, dict.fromkeys(notes)

    def _agreed(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of the first rank of a data-parallel model, on all of them."""
        if self._group is None or dist.get_world_size(self._group) == 1:
            return dict(keep)
        first = dist.get_global_rank(self._group, 0)
        agreed = {}
        for t in self.live.targets:
            mask = keep[t.name].contiguous()
            dist.broadcast(mask, first, group=self._group)
            agreed[t.name] = mask
        return agreed

    def _look_for_collapse(self, removed: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        for name, n in removed.items():
            note = f"{name} has no weight left: nothing passes through this layer any more."
            if n == sizes[name] and note not in self._notes:
                self._notes[note] = None
                warnings.warn(
                    f"At step {self.step} {note} An allocation that spares every layer: "
                    "sc.at_least(allocation, density).",
                    CollapseWarning,
                    stacklevel=2,
                )
