"""Carrying out cuts on a model: wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.callsites import Edit, apply_edits
from secateur.core.errors import SurgeryError
from secateur.core.modes import drop_caches
from secateur.core.names import unwrap
from secateur.graph.swapping import swap_modules_
from secateur.graph.trace import stored_tensors
from secateur.surgery.cuts import Attribute, Cuts
from secateur.surgery.journal import Journal
from secateur.surgery.metadata import stated_sizes
from secateur.surgery.optimizer import migrate


@dataclass(frozen=True)
class Applied:
    """A surgery that was carried out; `undo` takes it back, as long as the model was not changed since."""

    cuts: Cuts
    journal: Journal

    def undo(self) -> None:
        """Give the model its old tensors, numbers and classes back: the very same objects."""
        self.journal.undo()


def carry_out(model: nn.Module, cuts: Cuts, optimizers: Iterable[Optimizer] = ()) -> Applied:
    """Cut `model` in place. Whatever fails, the model is left as it was.

    Args:
        model: of the structure for which the cuts were made; on the meta device, shapes alone change.
        cuts: what to keep.
        optimizers: whose parameters and state follow.

    Raises:
        SurgeryError: the model does not have the tensors, shapes or attributes that the cuts are for.
    """
    model = unwrap(model)
    new = _new_tensors(model, cuts)
    journal = Journal()
    held: list[Any] = []  # an undo is registered before what it takes back is done
    journal.done(lambda: drop_caches(model))
    journal.done(lambda: [handle.undo() for handle in reversed(held)])
    try:
        if cuts.swaps:
            held.append(swap_modules_(model))
        if cuts.edits:
            held.append(apply_edits([Edit.from_dict(e) for e in cuts.edits]))
        slots = _slots(model)
        for name, tensor in stored_tensors(model).items():
            if name in new:
                for owner, key in slots[id(tensor)]:
                    journal.set_item(owner, key, new[name])
        for attribute in cuts.attributes:
            _set(model, attribute, journal)
        for module, name, scale in cuts.kept_scales:
            _keep(model, module, name, scale, journal)
        _follow(model, journal)
        replaced = _replaced(model, cuts, journal, new)
        for optimizer in optimizers:
            migrate(optimizer, replaced, journal)
        drop_caches(model)
        return Applied(cuts, journal)
    except BaseException:
        journal.undo()
        raise


def _new_tensors(model: nn.Module, cuts: Cuts) -> dict[str, Tensor]:
    """What is left of each tensor that is cut or scaled, computed before anything is changed."""
    stored = stored_tensors(model)
    new: dict[str, Tensor] = {}
    for name, (shape, _) in cuts.tensors.items():
        if name not in stored:
            raise SurgeryError(f"The model has no {name}, which the surgery cuts: it is for another model.")
        if tuple(stored[name].shape) != shape:
            raise SurgeryError(
                f"{name} has shape {list(stored[name].shape)}, but the surgery is for {list(shape)}: the "
                "model was cut before, or is another."
            )
        new[name] = _as_stored(cut_tensor(stored[name].detach(), name, cuts), stored[name])
    for name, (factor, offset) in cuts.scales.items():
        base = new.get(name, stored[name]).detach()
        new[name] = _as_stored(((base.double() + offset) * factor - offset).to(base.dtype), stored[name])
    return new


def cut_tensor(tensor: Tensor, name: str, cuts: Cuts) -> Tensor:
    """What the cuts leave of a tensor of the shape of `name`; a new tensor."""
    out = tensor
    for dim in range(tensor.dim()):
        index = cuts.index(name, dim)
        if index is not None:
            out = out.index_select(dim, index.to(tensor.device))
    # Storage order is kept, since kernels for channels-last weights are faster.
    return out.clone(memory_format=torch.preserve_format) if out is tensor else out


def _as_stored(value: Tensor, old: Tensor) -> Tensor:
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value


def _slots(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Every place that holds a tensor, by the tensor's id: ties have several."""
    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            for key, value in owner.items():
                if isinstance(value, Tensor):
                    slots.setdefault(id(value), []).append((owner, key))
    return slots


def owner_of(model: nn.Module, attribute: Attribute) -> Any:
    """The object that keeps a number; `SurgeryError` if the model has none there."""
    try:
        thing: Any = model.get_submodule(attribute.module)
        for step in attribute.steps:
            thing = vars(thing)[step] if isinstance(step, str) else vars(thing)[step[0]][step[1]]
        vars(thing)[attribute.name]
    except (AttributeError, KeyError, TypeError) as error:
        raise SurgeryError(
            f"The model keeps no number {attribute}, which the surgery sets ({error})."
        ) from None
    return thing


def _set(model: nn.Module, attribute: Attribute, journal: Journal) -> None:
    own = vars(owner_of(model, attribute))
    value = own[attribute.name]
    if attribute.index is None:
        _expect(attribute, value)
        journal.set_item(own, attribute.name, attribute.new)
        return
    if not isinstance(value, tuple | list) or attribute.index >= len(value):
        raise SurgeryError(f"{attribute} has no entry {attribute.index}: the surgery is for another model.")
    entries = list(value)
    _expect(attribute, entries[attribute.index])
    entries[attribute.index] = attribute.new
    journal.set_item(own, attribute.name, type(value)(entries))


def _keep(model: nn.Module, module: str, name: str, scale: float, journal: Journal) -> None:
    try:
        own = vars(model.get_submodule(module))
    except AttributeError as error:
        raise SurgeryError(
            f"The surgery keeps a scale in {module}, which the model lacks ({error})."
        ) from None
    journal.done(lambda: own.pop(name, None))
    own[name] = scale


def _expect(attribute: Attribute, found: Any) -> None:
    if found not in (attribute.old, attribute.new):
        raise SurgeryError(
            f"{attribute} is {found!r} where the surgery expects {attribute.old}: it is for another model."
        )


def _follow(model: nn.Module, journal: Journal) -> None:
    """Sizes kept for show, and the list in which recurrent layers keep their weights again."""
    for module in model.modules():
        own = vars(module)
        for name, size in stated_sizes(module):
            if name in own and own[name] != size:
                journal.set_item(own, name, int(size))
        if isinstance(module, nn.RNNBase):
            journal.set_item(
                own, "_flat_weights", [getattr(module, n, None) for n in module._flat_weights_names]
            )


def _replaced(model: nn.Module, cuts: Cuts, journal: Journal, new: Mapping[str, Tensor]) -> dict[Any, Any]:
    """New parameters and how to cut their optimizer state, by old parameter."""
    now = {id(t): name for name, t in new.items()}
    found: dict[Any, Any] = {}
    for old, fresh in journal.replaced():
        name = now.get(id(fresh))
        if name is not None and isinstance(old, nn.Parameter):
            if name in cuts.tensors:
                found[old] = (fresh, lambda t, name=name: cut_tensor(t, name, cuts))
            else:
                found[old] = (fresh, lambda t: t)
    return found
