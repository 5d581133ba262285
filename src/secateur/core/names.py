"""Which parameters of a model are pruned: found by role, filtered by name, each exclusion with a reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.errors import SelectionError
from secateur.core.layout import Layout, is_hf_conv1d, is_stack, layout_of, matrix_shape

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Where:
    """Which weights to prune, by glob patterns over names such as `layers.*.mlp.down_proj`.

    Without arguments: the weights of all linear, convolution, recurrent and attention layers, but never
    norms, biases, embeddings (nor weights tied to one) and the output head.

    Args:
        include: keep only weights that match one of these.
        exclude: then drop those that match one of these.
        also: add parameters that match, whatever their role: the head, embeddings, norms, biases.

    A pattern is compared with the parameter's name (`fc.weight`) and its module's (`fc`). One that
    matches nothing raises `SelectionError`.
    """

    include: str | tuple[str, ...] = "*"
    exclude: str | tuple[str, ...] = ()
    also: str | tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One parameter to prune, and how it is seen as a matrix."""

    name: str
    module: nn.Module = field(repr=False)
    attribute: str
    layout: Layout

    @property
    def weight(self) -> Tensor:
        """The live parameter."""
        parameter: Tensor = getattr(self.module, self.attribute)
        return parameter

    @property
    def matrix(self) -> Tensor:
        """The weight as `[out, in]`, detached; a view where the storage allows it."""
        return self.layout.matrix(self.weight.detach())

    @property
    def shape(self) -> torch.Size:
        """Shape `[out, in]` of the matrix."""
        return matrix_shape(self.layout, self.weight.shape)

    @property
    def run(self) -> int:
        """Inputs that lie side by side in a row: what N:M groups and blocks must divide."""
        return self.layout.run(self.weight.shape)


@dataclass(frozen=True)
class Expert(Target):
    """One matrix of a stack that a parameter holds."""

    index: int = 0

    @property
    def weight(self) -> Tensor:
        """A view of the live parameter."""
        parameter: Tensor = getattr(self.module, self.attribute)
        return parameter[self.index]


@dataclass(frozen=True)
class Selection:
    """What will be pruned, and what will not, with the reason."""

    targets: tuple[Target, ...]
    skipped: tuple[tuple[str, str], ...]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers; names are those of the inner one."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def select(
    model: nn.Module, where: Where | None = None, *, valueless: bool = False, experts: bool = False
) -> Selection:
    """Find the parameters that `where` selects; raise `SelectionError` if none is left.

    Parameters on the meta device are refused unless `valueless` says that they get values later. With
    `experts`, parameters that hold experts as a stack count as layers.
    """
    where = where or Where()
    model = unwrap(model)
    found = _parameters(model, valueless)
    include, exclude, also = (_as_globs(g) for g in (where.include, where.exclude, where.also))
    for label, globs in (("include", include), ("exclude", exclude), ("also", also)):
        _refuse_idle_globs(label, globs, [name for f in found for name in f.names])
    head = _head(model, found)
    targets, skipped = [], []
    for f in found:
        if f.matches(also) and not f.impossible:
            reason = None
        elif experts and is_stack(f.module, f.attribute) and f.name not in head:
            reason = f.filtered(include, exclude, where)
        elif f.refused or f.name in head:
            reason = f.refused or "part of the output head"
        else:
            reason = f.filtered(include, exclude, where)
        if reason is None:
            targets.append(f.target())
        elif not f.minor:
            skipped.append((f.name, reason))
    if not targets:
        raise SelectionError(_nothing_left(skipped))
    return Selection(tuple(targets), tuple(skipped))


@dataclass
class _Found:
    """A parameter with the role that decides whether it is pruned."""

    names: list[str]  # a tied weight has several; it goes by the first
    module: nn.Module
    attribute: str
    refused: str | None  # reason why it is left alone unless asked; None for an ordinary weight
    minor: bool = False  # biases and norms: not worth a line each in a report
    impossible: bool = False  # cannot be pruned even if asked

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def key(self) -> int:
        return id(self.module._parameters[self.attribute])

    def matches(self, globs: tuple[str, ...]) -> bool:
        return any(_matches(name, globs) for name in self.names)

    def filtered(self, include: tuple[str, ...], exclude: tuple[str, ...], where: Where) -> str | None:
        """Why it is not among those asked for, if it is not."""
        if not self.matches(include):
            return f"not in include={where.include!r}"
        return f"in exclude={where.exclude!r}" if self.matches(exclude) else None

    def target(self) -> Target:
        return Target(self.name, self.module, self.attribute, layout_of(self.module, self.attribute))


def _occurrences(model: nn.Module, valueless: bool) -> Iterator[_Found]:
    """Every parameter of every module, a tied one each time that it occurs."""
    for prefix, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                if not valueless:
                    _refuse_without_values(name, p)
                yield _role(name, module, attribute, p)


def _parameters(model: nn.Module, valueless: bool = False) -> list[_Found]:
    """Every distinct parameter; one that is tied to an embedding counts as an embedding."""
    found: dict[int, _Found] = {}
    for role in _occurrences(model, valueless):
        first = found.setdefault(role.key, role)
        if first is not role:
            first.names.append(role.name)
            if role.refused and not first.refused:
                first.refused = f"shared with {role.name}: {role.refused}"
    return list(found.values())


def _refuse_without_values(name: str, p: Tensor) -> None:
    if isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta:
        raise SelectionError(
            f"{name} has no values yet (lazy or on the meta device): load the weights first."
        )


def _role(name: str, module: nn.Module, attribute: str, p: Tensor) -> _Found:
    def refuse(reason: str, minor: bool = False, impossible: bool = False) -> _Found:
        return _Found([name], module, attribute, reason, minor, impossible)

    if hasattr(p, "device_mesh"):
        raise SelectionError(
            f"{name} is sharded over devices (DTensor), which is not supported: gather it first."
        )
    if p.dtype not in _DTYPES:
        return refuse(f"not a floating-point weight that can be pruned ({p.dtype})", impossible=True)
    if p.numel() == 0:
        return refuse("empty", impossible=True)
    if attribute.endswith("_orig") and hasattr(module, attribute.removesuffix("_orig") + "_mask"):
        return refuse("already pruned by torch.nn.utils.prune: call its remove() first", impossible=True)
    stem, _, suffix = attribute.rpartition("_")
    if suffix in ("orig", "g", "v") and isinstance(getattr(module, stem, None), Tensor):
        return refuse(
            f"{stem} is computed from it by weight or spectral norm: remove that first", impossible=True
        )
    if isinstance(module, parametrize.ParametrizationList):
        return refuse("computed by a parametrization: remove it first", impossible=True)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return refuse("an embedding")
    if p.dim() < 2:
        return refuse("a bias or norm", minor=True)
    if _is_layer(module) or isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        if attribute.startswith("bias"):
            return refuse("a bias or norm", minor=True)
        return _Found([name], module, attribute, None)
    return refuse(f"a raw parameter of {type(module).__name__}, whose role is unknown")


def _head(model: nn.Module, found: list[_Found]) -> set[str]:
    """Names of the output head's weights: as the model declares it, else the last weight of the model.

    A transformers model names its base model and its output embeddings; what lies outside the base is
    head. In any other module the head is the last ordinary weight in order of registration, if that is a
    linear or convolution layer and not part of a transformers model. A model of one weight has no head.
    """
    names = {f.key: f.name for f in found}
    head: set[int] = set()
    declared: list[str] = []  # prefixes of transformers models
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        declares = isinstance(getattr(module, "base_model_prefix", None), str)
        if declares and not start.startswith(tuple(declared)):  # of nested ones, the outer knows the head
            declared.append(start)
            head |= _declared_head(module)
    last = next((f for f in reversed(list(_occurrences(model, True))) if f.refused is None), None)
    several = sum(f.refused is None for f in found) > 1
    if last and several and _is_layer(last.module) and not last.name.startswith(tuple(declared)):
        head.add(last.key)
    return {names[key] for key in head}


def _declared_head(module: Any) -> set[int]:
    """Parameters of a transformers model outside its base model, and those of its output embeddings."""
    head: set[int] = set()
    base = getattr(module, module.base_model_prefix, None)
    if isinstance(base, nn.Module) and base is not module:
        head |= {id(p) for p in module.parameters()} - {id(p) for p in base.parameters()}
    output = getattr(module, "get_output_embeddings", lambda: None)()
    return head | {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else head


def _is_layer(module: nn.Module) -> bool:
    """Whether `module` is a linear or convolution layer."""
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_hf_conv1d(module)


def _as_globs(globs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    module = name.rpartition(".")[0]
    return any(matches(name, g) or matches(module, g) for g in globs)


def _refuse_idle_globs(label: str, globs: tuple[str, ...], names: list[str]) -> None:
    for glob in globs:
        if not any(_matches(name, (glob,)) for name in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3)
            hint = f" Close names: {', '.join(near)}." if near else ""
            raise SelectionError(f"{label}={glob!r} matches no parameter of the model.{hint}")


def _nothing_left(skipped: list[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    why = f" Left out: {shown}{more}." if skipped else " The model has no linear or convolution weights."
    return f"Nothing to prune is selected.{why} Where(also=...) adds a parameter whatever its role."


def matches(name: str, glob: str) -> bool:
    """Whether a glob means a name, or is it in full: names hold brackets, which globs read as ranges."""
    return name == glob or fnmatchcase(name, glob)
