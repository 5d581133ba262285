"""The tensors of any module: to one safetensors file and back, shared ones stored once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.artifacts.manifest import NAME, Ties
from secateur.artifacts.packed import read_packed, stored_name
from secateur.core.errors import ArtifactError
from secateur.masks import Masks

_SHOWN = 3  # names listed in a message


def ties(model: nn.Module) -> Ties:
    """Groups of names in the state dict that are one tensor, in the order of the state dict."""
    groups: dict[object, list[str]] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if not isinstance(t, Tensor) or not (t.is_meta or t.numel()):
            continue
        # Storage rather than identity: `a.weight.data = b.weight.data` ties as well. Meta tensors have none.
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), t.device, t.dtype, t.shape, t.stride())
        groups.setdefault(id(t) if t.is_meta else place, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def refuse_unsavable(model: nn.Module) -> None:
    """Raise `ArtifactError` for a state that is not made of plain tensors with values."""
    for name, t in model.state_dict(keep_vars=True).items():
        # Extra state may be any Python object, which only a pickle could hold.
        if not isinstance(t, Tensor) or name.rpartition(".")[2] == "_extra_state":
            raise ArtifactError(f"{name} is no tensor but extra state of a module, which cannot be saved.")
        if nn.parameter.is_lazy(t) or t.is_meta:
            raise ArtifactError(f"{name} has no values (lazy or on the meta device): load the weights first.")
        if hasattr(t, "device_mesh"):
            raise ArtifactError(f"{name} is sharded over devices (DTensor): gather it before saving.")
        if t.layout != torch.strided or t.is_quantized:
            raise ArtifactError(f"{name} is not dense ({t.layout}, {t.dtype}): make it dense before saving.")


def write_tensors(model: nn.Module, path: Path) -> None:
    """Write the state dict to one safetensors file, each group of tied names under its first."""
    again = {name for group in ties(model) for name in group[1:]}
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name not in again}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        # A full disk, tensors that overlap in part, a dtype that the format lacks.
        what = f"The weights of {type(model).__name__} cannot be saved"
        raise ArtifactError(f"{what}: {first_line(error)}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or the packed one in its place; `ArtifactError` if it is corrupt."""
    stored = stored_name(path.parent, path.name)
    if stored != path.name:
        return read_packed(path.parent / stored)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is not a sound safetensors file: {first_line(error)}") from None
    return tensors


def untie(tensors: Mapping[str, Tensor], tied: Ties, path: Path) -> dict[str, Tensor]:
    """The stored tensors under all their names."""
    found = dict(tensors)
    for first, *others in tied:
        if first not in tensors or any(name in tensors for name in others):
            raise ArtifactError(f"{path} does not hold {listed([first, *others])} once, as {NAME} says.")
        found.update((name, tensors[first]) for name in others)
    return found


def fill_(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Ties, masks: Masks | None, origin: Path
) -> None:
    """Load `tensors` into `model`, to the bit and in their own dtypes; on an error nothing has changed.

    Raises `ArtifactError` if names, shapes or ties differ, `MaskError` if a weight that `masks` removes is
    not zero.
    """
    live: dict[str, Tensor] = model.state_dict(keep_vars=True)
    kind = type(model).__name__
    for name, t in live.items():
        if nn.parameter.is_lazy(t) or t.is_meta:
            raise ArtifactError(f"{name} of the given {kind} is lazy or meta: build it with values first.")
    refuse_misfit(live, tensors, origin, kind)
    with _unchanged_on_error(live):
        for name, t in live.items():
            if t.dtype != tensors[name].dtype:
                t.data = t.data.to(tensors[name].dtype)
        # Some modules read the version of their layout, which is this one's: names and shapes agree.
        state: Any = OrderedDict(tensors)
        state._metadata = getattr(live, "_metadata", None)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ArtifactError(f"{kind} does not take what {origin} holds: {first_line(error)}") from None
        for name, t in model.state_dict().items():
            if not _same_bits(t, tensors[name]):
                raise ArtifactError(
                    f"{kind} changes {name} when it is loaded, so that {origin} does not fit."
                )
        refuse_other_ties(model, tied, origin)
        if masks is not None:
            masks.check(model)


def refuse_misfit(
    live: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: Path, model: str
) -> None:
    """Raise `ArtifactError` unless names, shapes and kinds of numbers are the same."""
    missing, unexpected = live.keys() - tensors.keys(), tensors.keys() - live.keys()
    problems = []
    if missing:
        problems.append(f"it lacks {listed(missing)}, which {model} has")
    if unexpected:
        problems.append(f"it holds {listed(unexpected)}, which {model} lacks")
    for name in live.keys() & tensors.keys():
        ours, theirs = live[name], tensors[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} is {tuple(theirs.shape)} in it and {tuple(ours.shape)} in {model}")
        elif _number_kind(ours) != _number_kind(theirs):
            problems.append(f"{name} is {theirs.dtype} in it and {ours.dtype} in {model}")
    if problems:
        shown = problems[: _SHOWN + 2]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ArtifactError(f"{origin} does not fit the given model: {'; '.join(shown)}{more}.")


def refuse_other_ties(model: nn.Module, tied: Ties, origin: Path) -> None:
    """Raise `ArtifactError` unless exactly the names in each group of `tied` are one tensor in `model`."""
    ours, theirs = {frozenset(group) for group in ties(model)}, {frozenset(group) for group in tied}
    for groups, where, elsewhere in (
        (theirs - ours, origin, "the model"),
        (ours - theirs, "the model", origin),
    ):
        for group in groups:
            what = f"{listed(group)} are one tensor in {where}"
            raise ArtifactError(f"{what} but not in {elsewhere}: tie the same weights.")


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error, as the end of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}".rstrip(".") + "."


def _number_kind(t: Tensor) -> tuple[bool, bool]:
    return t.is_floating_point(), t.is_complex()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Not torch.equal: NaN is not equal to itself, and the eight-bit floats do not compare.
    x, y = (t.detach().cpu().contiguous().reshape(-1) for t in (a, b))
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@contextmanager
def _unchanged_on_error(live: Mapping[str, Tensor]) -> Iterator[None]:
    saved = [(t, t.data, t.detach().clone()) for t in live.values()]
    try:
        yield
    except BaseException:
        for t, data, values in saved:
            t.data = data
            data.copy_(values)
        raise
