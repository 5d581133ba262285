"""Masks of a model in training: changed by a method, written into weights after every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.core.bulk import count_nonzero, zero_
from secateur.core.errors import MaskError
from secateur.core.names import Target, unwrap
from secateur.masks import Masks


class LiveMasks:
    """One boolean tensor for each target, True means keep, in the shape and memory format of its parameter.

    Parameters are looked up whenever they are written, so one that was replaced meanwhile is still masked.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self._keep = {t.name: torch.ones_like(t.weight, dtype=torch.bool) for t in targets}
        self._whole = {t.name for t in targets}  # nothing removed, so nothing to write
        self._copies: list[tuple[nn.Parameter, str]] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._keep[name]

    @property
    def masks(self) -> Masks:
        """A copy, which later changes leave alone."""
        return Masks({name: keep.clone() for name, keep in self._keep.items()})

    @property
    def removed(self) -> dict[str, int]:
        """Weights removed from each target."""
        return {name: keep.numel() - count_nonzero(keep) for name, keep in self._keep.items()}

    def replace(self, keep: Mapping[str, Tensor]) -> None:
        """Take over new masks, in the shapes of the parameters; nothing is written to the model."""
        for t in self.targets:
            given = keep.get(t.name)
            if given is None or given.shape != t.weight.shape or given.dtype != torch.bool:
                got = "nothing" if given is None else f"{given.dtype} of {tuple(given.shape)}"
                raise MaskError(f"The mask of {t.name} must be boolean, {tuple(t.weight.shape)}; got {got}.")
        for t in self.targets:
            self._keep[t.name] = torch.empty_like(t.weight, dtype=torch.bool).copy_(keep[t.name])
        self._whole = {name for name, n in self.removed.items() if n == 0}

    def follow(self, models: Iterable[nn.Module]) -> None:
        """Write into these copies of the model too (averages of its weights) whenever masks are written."""
        self._copies = []
        for model in models:
            if isinstance(model, AveragedModel):
                model = model.module
            named = dict(unwrap(model).named_parameters(remove_duplicate=False))
            for t in self.targets:
                parameter = named.get(t.name)
                if parameter is None or parameter.shape != t.weight.shape:
                    raise MaskError(f"A copy that should follow the masks has no {t.name} of this shape.")
                self._copies.append((parameter, t.name))

    def write(self) -> None:
        """Zero the weights that are not kept."""
        for t in self._partial():
            zero_(_parameter(t), self._on(t.name, t.weight.device))

    def write_copies(self) -> None:
        """The same in the copies; enough when masks change, since an average of zeros is zero."""
        for parameter, name in self._copies:
            zero_(parameter, self._on(name, parameter.device))

    def write_gradients(self) -> None:
        """Zero the gradients of weights that are not kept."""
        for t in self._partial():
            if t.weight.grad is not None:
                zero_(t.weight.grad, self._on(t.name, t.weight.device))

    def _partial(self) -> Iterator[Target]:
        return (t for t in self.targets if t.name not in self._whole)

    def _on(self, name: str, device: torch.device) -> Tensor:
        keep = self._keep[name]
        if keep.device != device:
            keep = self._keep[name] = keep.to(device)
        return keep


def _parameter(target: Target) -> nn.Parameter:
    parameter = target.module._parameters.get(target.attribute)
    if parameter is None:
        raise MaskError(
            f"{target.name} is no longer a parameter of the model, but is being pruned while it trains: "
            "detach the method before changing the model."
        )
    return parameter
