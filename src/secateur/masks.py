"""Masks: which weights live, as boolean tensors beside an ordinary model. True means keep.

Nothing is attached to the model: parameters stay plain parameters under their own names, so copying,
saving, exporting, compiling and dense gradients work as ever. Training keeps the zeros through one hook on
the optimizer (`Masks.hold`), since momentum and weight decay would move them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from secateur.core.bulk import zero_
from secateur.core.errors import ArtifactError, MaskError
from secateur.core.files import replacing
from secateur.core.names import Where, select, unwrap

FORMAT = "secateur-masks-1"


class Masks(Mapping[str, Tensor]):
    """Boolean tensors by parameter name, each in the shape of its parameter. Immutable by convention.

    Algebra: `a & b` keeps what both keep, `a | b` what either keeps, `~a` the complement, `a - b` what only a
    keeps; `a <= b` says that a keeps no weight that b does not (nested levels). Both sides must cover the
    same parameters.

    Raises `MaskError` for tensors that are not boolean.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, t in tensors.items():
            if getattr(t, "dtype", None) != torch.bool:
                raise MaskError(f"The mask of {name} is not a boolean tensor.")
        self._tensors = dict(tensors)

    @classmethod
    def of(cls, model: nn.Module, where: Where | None = None) -> Masks:
        """The masks that a model's zeros already form: True where a weight is not zero."""
        return cls({t.name: t.weight.detach() != 0 for t in select(model, where).targets})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Masks({len(self)} parameters, sparsity {self.sparsity:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(m, other[n].to(m.device)) for n, m in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Masks) -> Masks:
        return self._zip(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._zip(other, torch.logical_or)

    def __sub__(self, other: Masks) -> Masks:
        return self._zip(other, lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        return Masks({n: ~m for n, m in self.items()})

    def __le__(self, other: Masks) -> bool:
        return not any(bool(m.any()) for m in (self - other).values())

    @property
    def entries(self) -> int:
        """Weights covered."""
        return sum(m.numel() for m in self.values())

    @property
    def kept(self) -> int:
        """Weights kept."""
        return sum(int(m.count_nonzero()) for m in self.values())

    @property
    def density(self) -> float:
        """Fraction kept; 1 if nothing is covered."""
        return 1.0 - self.sparsity

    @property
    def sparsity(self) -> float:
        """Fraction removed; 0 if nothing is covered."""
        return (self.entries - self.kept) / max(1, self.entries)

    def by_layer(self) -> dict[str, float]:
        """Sparsity of each parameter."""
        return {n: int((~m).count_nonzero()) / max(1, m.numel()) for n, m in self.items()}

    def iou(self, other: Masks) -> float:
        """Weights that both keep over weights that either keeps: 1 for equal masks."""
        union = (self | other).kept
        return (self & other).kept / union if union else 1.0

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks({n: m.to(device) for n, m in self.items()})

    def apply_(self, model: nn.Module) -> None:
        """Zero the weights that are not kept. Everything is checked before anything is written."""
        pairs = self._parameters(model)
        for parameter, mask in pairs:
            zero_(parameter, mask.to(parameter.device))

    def check(self, model: nn.Module) -> None:
        """Raise `MaskError` if the masks do not fit the model or a weight that is not kept is not zero."""
        for (name, mask), (parameter, _) in zip(self.items(), self._parameters(model), strict=True):
            alive = int((parameter.detach() != 0).logical_and_(~mask.to(parameter.device)).count_nonzero())
            if alive:
                raise MaskError(
                    f"{alive} weights of {name} are not zero though its mask removes them: hold the masks on "
                    "the optimizer that trains the model, or apply_ them again."
                )

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
        """Apply the masks now and after every step of `optimizer`, until released.

        Use as a context manager, or call `release()`. Gradients stay dense. Cost: one write to the masked
        parameters a step.

        Raises `MaskError` if the masks do not fit the model, or the optimizer trains none of its weights.
        """
        return Hold(self, model, optimizer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, one bit a weight, atomically."""
        packed = {n: np.packbits(m.cpu().numpy().reshape(-1)) for n, m in self.items()}
        shapes = json.dumps({n: list(m.shape) for n, m in self.items()})
        metadata = {"format": FORMAT, "shapes": shapes, "sha256": _digest(shapes, packed)}
        with replacing(path) as temporary:
            save_file(packed, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote; `ArtifactError` if the file is missing, corrupt or something else."""
        if not Path(path).is_file():
            raise ArtifactError(f"There is no mask file {path}.")
        try:
            with safe_open(path, framework="np") as f:
                meta = f.metadata() or {}
                if meta.get("format") == FORMAT:
                    packed = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, not a mapping
        except (SafetensorError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is not a safetensors file, or a damaged one: {error}.") from None
        if meta.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not a mask file of this format ({FORMAT}).")
        shapes = meta.get("shapes", "")
        if meta.get("sha256") != _digest(shapes, packed):
            raise ArtifactError(f"{path} is damaged: its contents do not match their checksum.")
        return cls({name: _unpack(packed[name], shape) for name, shape in json.loads(shapes).items()})

    def _zip(self, other: Masks, f: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        if self.keys() != other.keys():
            odd = sorted(self.keys() ^ other.keys())[0]
            raise MaskError(f"The two masks cover different parameters: only one of them has {odd}.")
        for name, mask in self.items():
            if mask.shape != other[name].shape:
                shapes = f"{tuple(mask.shape)} and {tuple(other[name].shape)}"
                raise MaskError(f"The masks of {name} differ in shape: {shapes}.")
        return Masks({n: f(m, other[n].to(m.device)) for n, m in self.items()})

    def _parameters(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        named = dict(unwrap(model).named_parameters(remove_duplicate=False))
        pairs = []
        for name, mask in self.items():
            parameter = named.get(name)
            if parameter is None:
                raise MaskError(f"The model has no parameter {name}, which the masks cover.")
            if parameter.shape != mask.shape:
                raise MaskError(f"{name} has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}.")
            pairs.append((parameter, mask))
        return pairs


class Hold:
    """Masks held on an optimizer; see `Masks.hold`."""

    def __init__(self, masks: Masks, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p, _ in masks._parameters(model)):
            raise MaskError(
                "The optimizer trains none of the masked parameters: is it the optimizer of this model?"
            )
        masks.apply_(model)
        # Parameters are looked up at every step, so one that was replaced meanwhile is still masked.
        inner = unwrap(model)
        self._slots: list[tuple[nn.Module, str, Tensor]] = []
        for name, mask in masks.items():
            owner, _, attribute = name.rpartition(".")
            # In the parameter's memory format, so that both can be read as one run of entries.
            kept = torch.empty_like(inner.get_parameter(name), dtype=torch.bool).copy_(mask)
            self._slots.append((inner.get_submodule(owner), attribute, kept))
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def release(self) -> None:
        """Stop holding; the weights stay as they are."""
        self._handle.remove()

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _after_step(self, *_: Any) -> None:
        for i, (module, attribute, kept) in enumerate(self._slots):
            parameter = module._parameters.get(attribute)
            if parameter is None:
                raise MaskError(
                    f"{attribute} of {type(module).__name__} is no longer a parameter, but masks are held on "
                    "it: release them before changing the model."
                )
            if kept.device != parameter.device:
                kept = kept.to(parameter.device)
                self._slots[i] = (module, attribute, kept)
            zero_(parameter, kept)


def _digest(shapes: str, packed: Mapping[str, np.ndarray]) -> str:
    """Checksum of a file's contents: a bit that flips on disk would be another mask."""
    digest = hashlib.sha256(shapes.encode())
    for name in sorted(packed):
        digest.update(name.encode() + packed[name].dtype.str.encode() + packed[name].tobytes())
    return digest.hexdigest()


def _unpack(packed: np.ndarray, shape: Sequence[int]) -> Tensor:
    bits = np.unpackbits(packed, count=math.prod(shape)).astype(bool)
    return torch.from_numpy(bits).view(tuple(shape))
