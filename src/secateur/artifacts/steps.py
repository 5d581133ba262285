"""`surgery.json`: what was cut, dropped and made sparse, in order, as data that is checked and never run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.artifacts.manifest import SURGERY, read_json
from secateur.artifacts.sparse import Sparse, ready_, sparsify_
from secateur.callsites import Edit
from secateur.core.errors import ArtifactError, SecateurError
from secateur.core.files import write_text
from secateur.layers import Changes, DropRecord
from secateur.layers import replay_ as drop_again_
from secateur.surgery import Cuts, carry_out
from secateur.surgery.cuts import Node

FORMAT = 1
_MOST_POSITIONS = 2**26  # of all axes together; a model of 405 billion parameters has some millions


@dataclass(frozen=True)
class Dropped:
    """Blocks that were dropped, as data.

    Attributes:
        changes: to lists and values.
        config_ok: whether the configuration describes what is left.
        data: as from `DropRecord.to_dict`.
    """

    changes: Changes
    config_ok: bool
    data: Mapping[str, Any]


Step = Cuts | Dropped | Sparse
Surgery = Sequence[Cuts | DropRecord] | str | os.PathLike[str]
"""What was done, in order; or a folder or file that holds it."""


def as_steps(surgery: Surgery) -> tuple[Step, ...]:
    """The steps that change anything; `ArtifactError` for what is neither cuts nor dropped blocks."""
    if isinstance(surgery, str | os.PathLike):
        path = Path(surgery)
        return read_steps(path / SURGERY if path.is_dir() else path)
    if not isinstance(surgery, Sequence):
        raise ArtifactError("surgery= is a sequence of steps, in order: give [plan.cuts] or report.cuts.")
    steps = []
    for step in surgery:
        if not isinstance(step, Cuts | DropRecord):
            raise ArtifactError(
                f"surgery= holds a {type(step).__name__}: give Cuts, from plan.cuts, applied.cuts or "
                "report.cuts, and the DropRecord of dropped blocks."
            )
        kind = "cuts" if isinstance(step, Cuts) else "drop"
        # Through JSON, so that what is written is what will be read.
        steps.append(_step(json.loads(json.dumps({kind: step.to_dict()}))))
    return tuple(step for step in steps if not _is_nothing(step))


def write_steps(steps: Iterable[Step], path: Path) -> None:
    """Write `surgery.json`."""
    data = [_data(step) for step in steps]
    write_text(path, json.dumps({"format": FORMAT, "steps": data}) + "\n")
    read_steps(path)  # too large a file would be refused later


def read_steps(path: Path) -> tuple[Step, ...]:
    """Read `surgery.json`; `ArtifactError` unless it is what `write_steps` writes."""
    data = read_json(path)
    if type(data.get("format")) is int and data["format"] > FORMAT:
        raise ArtifactError(f"{path} has format {data['format']}, newer than {FORMAT}: update Secateur.")
    if (
        type(data.get("format")) is not int
        or data["format"] != FORMAT
        or not isinstance(data.get("steps"), list)
    ):
        raise ArtifactError(f"{path} is no surgery of a known format.")
    try:
        return tuple(_step(step) for step in data["steps"])
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply.") from None
    except SecateurError as error:
        raise ArtifactError(f"{path}: {error}") from None


def replay_(model: nn.Module, steps: Iterable[Step], origin: Path) -> Callable[[], None]:
    """Do the steps to a dense model, in place, without running it; on an error it is as it was.

    The model may be on the meta device. Returns a function that takes everything back.

    Raises `ArtifactError` if the steps are for another model, or for another version of its code.
    """
    done: list[Callable[[], None]] = []

    def undo() -> None:
        while done:
            done.pop()()

    try:
        for step in steps:
            if isinstance(step, Sparse):
                done.append(sparsify_(model, step))
            elif isinstance(step, Cuts):
                done.append(carry_out(model, step).undo)
            else:
                done.append(drop_again_(model, step.data).undo)
    except Exception as error:  # a file can fail to fit in as many ways as there are models
        undo()
        what = f"The surgery in {origin} does not fit the {type(model).__name__}"
        raise ArtifactError(f"{what}, which must be as it was before: {_sentence(error)}") from error
    except BaseException:
        undo()
        raise
    return undo


def expressed(step: Step) -> bool:
    """Whether the configuration of a Hugging Face model describes what the step left."""
    if isinstance(step, Sparse):
        return False
    return step.expressed if isinstance(step, Cuts) else step.config_ok


def check_sparse(steps: Iterable[Step], tensors: Mapping[str, Tensor]) -> None:
    """Raise `ArtifactError` unless kernels can read what was saved for sparse layers."""
    for step in steps:
        if isinstance(step, Sparse):
            step.check(tensors)


def ready_sparse_(model: nn.Module, steps: Iterable[Step]) -> None:
    """What sparse layers need once they are filled."""
    for step in steps:
        if isinstance(step, Sparse):
            ready_(model, step)


def refuse_other_surgery(model: nn.Module, steps: Sequence[Step]) -> None:
    """Raise `ArtifactError` unless the shapes that the steps leave are those of `model`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for step in steps:
        if isinstance(step, Dropped):
            moved = {later_name(name, step): shape for name, shape in shapes.items()}
            shapes = {name: shape for name, shape in moved.items() if name is not None}
            continue
        if isinstance(step, Sparse):
            shapes = {n: s for n, s in shapes.items() if n.removesuffix(".weight") not in step.layers}
            continue
        for name, (before, _) in step.tensors.items():
            if shapes.get(name, before) != before:
                found = f"{name} is {shapes[name]} after one step of it and {before} before a later one"
                raise ArtifactError(f"The steps of the surgery do not follow one another: {found}.")
            shapes[name] = tuple(int(step.mask(name, dim).sum()) for dim in range(len(before)))
    live = _shapes(model) if shapes else {}
    may_be_gone = any(isinstance(step, Dropped) for step in steps)
    for name, shape in shapes.items():
        if live.get(name, shape if may_be_gone else ()) != shape:
            raise ArtifactError(
                f"{name} is {live.get(name, 'missing')} in the model, but {shape} after the surgery: give "
                "all steps that the model went through, in order."
            )


def later_name(name: str, step: Step) -> str | None:
    """The name of a module or tensor after a step, by its name before; None if its block was dropped."""
    lists = {c.stack: c for c in step.changes.cuts} if isinstance(step, Dropped) else {}
    parts = name.split(".")
    now = []
    for i, part in enumerate(parts):
        cut = lists.get(".".join(parts[:i]))
        if cut is None or not part.isdigit():
            now.append(part)
        elif int(part) not in cut.kept:
            return None
        else:
            now.append(str(cut.kept.index(int(part))))
    return ".".join(now)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every tensor, under all its names."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers, vars(module)):
            for name, t in owner.items():
                if isinstance(t, Tensor):
                    found[f"{prefix}.{name}" if prefix else name] = tuple(t.shape)
    return found


def _is_nothing(step: Step) -> bool:
    if isinstance(step, Sparse):
        return not step.layers
    if isinstance(step, Dropped):
        return not step.changes.cuts and not step.changes.edits
    return not (step.tensors or step.attributes or step.scales or step.edits)


def _step(data: Any) -> Step:
    if isinstance(data, dict) and data.keys() == {"cuts"}:
        return _cuts(data["cuts"])
    if isinstance(data, dict) and data.keys() == {"drop"}:
        return _dropped(data["drop"])
    if isinstance(data, dict) and data.keys() == {"sparse"}:
        return Sparse.from_dict(data["sparse"])
    raise ArtifactError("The surgery is damaged: a step is neither cuts nor dropped blocks nor sparse.")


def _data(step: Step) -> dict[str, Any]:
    if isinstance(step, Sparse):
        return {"sparse": step.to_dict()}
    return {"cuts": step.to_dict()} if isinstance(step, Cuts) else {"drop": dict(step.data)}


def _cuts(data: Any) -> Cuts:
    if not _is_bounded(data):
        raise ArtifactError("The surgery is damaged: the sizes of its axes are missing or too large.")
    cuts = Cuts.from_dict(data)
    for name, (shape, nodes) in cuts.tensors.items():
        if tuple(_extent(node, cuts) for node in nodes) != shape:
            raise ArtifactError(
                f"The surgery is damaged: the cut of {name} is not for its shape, {list(shape)}."
            )
    kept_scales = [(f"attention in {m or 'the model'}", (s,)) for m, _, s in cuts.kept_scales]
    for name, scale in (*cuts.scales.items(), *kept_scales):
        if not all(map(math.isfinite, scale)):
            raise ArtifactError(f"The surgery is damaged: the scale of {name} is not finite.")
    for edit in cuts.edits:
        Edit.from_dict(edit)
    return cuts


def _is_bounded(data: Any) -> bool:
    """Whether the kept positions can be listed in memory."""
    try:
        axes = data["axes"].values()
        inside = all(0 <= low < high <= a["size"] for a in axes for low, high in a["kept"])
        return inside and sum(a["size"] for a in axes) <= _MOST_POSITIONS
    except (TypeError, KeyError, ValueError, AttributeError):
        return False


def _extent(node: Node, cuts: Cuts) -> int:
    if isinstance(node, int):
        return node
    if isinstance(node, str):
        return cuts.axes[node].size
    parts = [_extent(part, cuts) for part in node[1:]]
    return sum(parts) if node[0] == "+" else math.prod(parts)


def _dropped(data: Any) -> Dropped:
    changes = data.get("changes") if isinstance(data, dict) else None
    if not isinstance(changes, dict) or type(data.get("config_ok")) is not bool:
        raise ArtifactError("The record of dropped blocks is damaged.")
    for field, is_sound in (("cuts", _is_cut), ("edits", _is_edit)):
        entries = changes.get(field)
        if not isinstance(entries, list) or not all(map(is_sound, entries)):
            raise ArtifactError(f"The record of dropped blocks is damaged: its {field} are not.")
    return Dropped(Changes.from_dict(changes), data["config_ok"], data)


def _is_cut(cut: Any) -> bool:
    return (
        isinstance(cut, dict)
        and isinstance(cut.get("stack"), str)
        and type(cut.get("length")) is int
        and isinstance(cut.get("kept"), list)
        and all(type(i) is int for i in cut["kept"])
    )


def _is_edit(edit: Any) -> bool:
    if (
        not isinstance(edit, dict)
        or not isinstance(edit.get("module"), str)
        or not {"old", "new"} <= edit.keys()
    ):
        return False
    path: Any = edit.get("path")
    named = isinstance(path, list) and bool(path) and all(isinstance(name, str) for name in path)
    return (
        named
        and all(name.isidentifier() and not name.startswith("__") for name in path)
        and _is_value(edit["old"])
        and _is_value(edit["new"])
    )


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_value, value))
    return value is None or isinstance(value, int | float | str)


def _sentence(error: Exception) -> str:
    """A Secateur error speaks for itself; of others the class says what is wrong."""
    text = str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
    return text.rstrip(".") + "."
