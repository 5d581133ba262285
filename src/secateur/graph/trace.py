"""Running a model once, on tensors without data, while every operator types its outputs."""

from __future__ import annotations

import types as std
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.modes import drop_caches, evaluation, unfused
from secateur.graph import axes
from secateur.graph.engines import Engine, Fake, Light, Real
from secateur.graph.ints import Attr, Ledger, TracedInt, watched
from secateur.graph.rules import RULES, Call, Rule
from secateur.graph.rules.pointwise import is_pointwise, pointwise
from secateur.graph.sizes import Argument, SizeMode, Tie
from secateur.graph.swapping import swap_modules_
from secateur.graph.types import Stored, Type, Types, TypingError, blame, everywhere

_UNTRACED = frozenset(
    [
        "stride",
        "padding",
        "dilation",
        "kernel_size",
        "output_padding",
        "padding_idx",
        "layer_idx",
        "training",
        "_version",
    ]
)
_SIMPLE = frozenset([int, float, bool, str, tuple, list, type(None)])
_PARTS = frozenset(["_parameters", "_buffers", "_modules"])  # of a module
_LONGEST = 64  # entries of a tuple or list of sizes


@dataclass
class Traced:
    """What one run of a model taught."""

    types: Types
    ledger: Ledger
    ties: list[Tie]
    calls: Mapping[object, Collection[Argument]]  # of views, by place in the code
    owners: dict[int, Owner]
    output: Any = field(repr=False)
    engine: str
    swapped: tuple[str, ...] = ()
    note: str | None = None  # why the run was on real tensors


@dataclass(frozen=True)
class Owner:
    """An object that keeps integers: a module, or a configuration reached through one.

    Attributes:
        object: the object itself.
        module: name of the module that it is, or that reaches it.
        steps: attribute names that lead from the module to it; a pair is an attribute and a key in it.
    """

    object: Any
    module: str
    steps: tuple[str | tuple[str, str], ...] = ()

    @property
    def is_module(self) -> bool:
        """Whether it is a module, not a configuration."""
        return not self.steps

    @property
    def path(self) -> str:
        """A name for messages."""
        steps = [s if isinstance(s, str) else f"{s[0]}[{s[1]}]" for s in self.steps]
        return ".".join((self.module, *steps)).strip(".")


class _RuleMode(TorchDispatchMode):
    """Runs each operator, then its rule."""

    def __init__(self, types: Types, engine: Engine) -> None:
        super().__init__()
        self.types, self.engine = types, engine
        # By id, since hashing operators is slow; the operator is kept, so that an id means one.
        self._known: dict[int, tuple[str, Rule | None, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out, args, kwargs = self.engine.run(func, args, kwargs or {})
        name, rule, _ = self._known.get(id(func)) or self._look_up(func)
        if name.startswith("prim::"):
            return out
        self.types.operators[name] += 1
        call = Call(func, name, args, kwargs, out)
        try:
            if rule is None:
                raise TypingError("no rule")
            rule(self.types, call)
        except Exception as error:
            self._refuse(call, error)
        return out

    def _look_up(self, func: Any) -> tuple[str, Rule | None, Any]:
        name = func._schema.name
        rule = RULES.get(f"{name}.{func._schema.overload_name}") or RULES.get(name)
        if rule is None and is_pointwise(func, name.rpartition("::")[2]):
            rule = pointwise
        return self._known.setdefault(id(func), (name, rule, func))

    def _refuse(self, call: Call, error: Exception) -> None:
        """Freeze all that the call touches: what is not understood is not cut."""
        unknown = str(error) == "no rule"
        reason = blame(f"no rule for {call.name}" if unknown else f"{call.name} is not understood ({error})")
        touched = False
        for t in call.tensors:
            for dim in self.types.dims(t):
                touched |= axes.freeze(dim, reason)
        for out in call.outs:
            if not self.types.has(out):
                dims = [axes.fresh(n, reason) for n in out.shape]
                self.types.put(out, dims, live=everywhere(dims))
        if touched or unknown:
            self.types.unknown.setdefault(call.name, reason)


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """Trace one forward pass, without data if the code allows it, else on the model's own tensors.

    The model is left as it was: what the pass stores in modules is put back.
    """
    empty = any(p.is_meta for p in model.parameters())
    reasons: list[str] = []
    for engine in ("light", "fake") if empty else ("light", "fake", "real"):
        try:
            traced = _run(model, args, kwargs, engine)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            if engine == ("fake" if empty else "real"):
                raise
            continue
        traced.note = (
            f"Traced on real tensors, since the code reads values ({reasons[-1]})."
            if engine == "real"
            else None
        )
        return traced
    raise AssertionError("no engine")


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], how: str) -> Traced:
    types, ledger, ties = Types(), Ledger(), []  # type: ignore[var-annotated]
    for name, tensor in stored_tensors(model).items():
        dims = [axes.fresh(n) for n in tensor.shape]
        is_parameter = isinstance(tensor, nn.Parameter)
        live = frozenset() if is_parameter else everywhere(dims)
        types.stored[id(tensor)] = Stored(
            name, tensor, Type(dims, live, root=name if is_parameter else None), is_parameter
        )
    engine: Engine = Light(types) if how == "light" else Fake() if how == "fake" else Real()
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        drop_caches(model)
        modules = list(model.named_modules())
        stack.enter_context(_untouched(m for _, m in modules))
        if how == "real":
            stack.callback(
                _put_back, [(s.tensor, s.tensor.clone()) for s in types.stored.values() if not s.is_parameter]
            )
        stack.enter_context(unfused())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(_python_wrappers_run())
        stack.enter_context(engine.active())
        inputs = _inputs((args, dict(kwargs)), engine)
        swapped = swap_modules_(model)
        stack.callback(swapped.undo)
        owners = stack.enter_context(_traced_attributes(modules, ledger))
        stack.enter_context(_module_names(modules, types))
        stack.enter_context(_RuleMode(types, engine))
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        mode = SizeMode(types, ledger, ties, device if how == "light" else None)
        stack.enter_context(mode)
        stack.enter_context(watched(ledger))
        ledger.listening = True
        output = model(*inputs[0], **inputs[1])
        ledger.listening = False
    return Traced(types, ledger, ties, mode.calls, owners, output, how, swapped.names)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and plain tensor attributes, each once, by their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for name, tensor in (*module._parameters.items(), *module._buffers.items(), *plain.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def _inputs(tree: Any, engine: Engine) -> Any:
    """The inputs, as tensors whose dimensions are never cut."""

    def typed(x: Any) -> Any:
        if isinstance(x, Tensor):
            t = engine.input(x)
            t._secateur_type = Type([axes.fresh(n, "a dimension of the input") for n in t.shape])  # type: ignore[attr-defined]
            return t
        if isinstance(x, Mapping) and not hasattr(x, "__dataclass_fields__"):
            return {k: typed(v) for k, v in x.items()}
        if type(x) in (list, tuple):
            return type(x)(typed(v) for v in x)
        return x

    return typed(tree)


@contextmanager
def _python_wrappers_run() -> Iterator[None]:
    """Let torch's Python functions run their bodies, so that the function mode sees the calls inside."""
    patched: list[tuple[Any, str, Any]] = []

    def nothing_overridden(*args: Any, **kwargs: Any) -> bool:
        return False

    try:
        for module in (F, torch._tensor, torch.functional):
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
                if hasattr(module, name):
                    patched.append((module, name, getattr(module, name)))
                    setattr(module, name, nothing_overridden)
        yield
    finally:
        for module, name, value in patched:
            setattr(module, name, value)


@contextmanager
def _module_names(modules: Sequence[tuple[str, nn.Module]], types: Types) -> Iterator[None]:
    """While this holds, `types.modules` names the modules that are running, the innermost last."""
    types.names.update((id(module), name) for name, module in modules)

    def enter(module: nn.Module, args: Any) -> None:
        types.modules.append(types.names.get(id(module), ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        types.modules.pop()

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back what a forward pass stores in modules."""
    saved = [(m, dict(vars(m)), _containers(vars(m)), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, attributes, containers, buffers in saved:
            own = vars(module)
            for name in [n for n in own if n not in attributes]:
                del own[name]
            own.update(attributes)
            for name, live in attributes.items():
                if type(live) in (dict, list) and (live or name in containers):
                    content = containers.get(name, ())
                    live.clear()
                    live.update(content) if isinstance(live, dict) else live.extend(content)
            module._buffers.clear()
            module._buffers.update(buffers)


def _put_back(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Values of buffers, where the pass wrote to them."""
    for tensor, value in saved:
        if not torch.equal(tensor, value):
            tensor.copy_(value)


def _containers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the dicts and lists that are not empty."""
    return {k: type(v)(v) for k, v in attributes.items() if type(v) in (dict, list) and v}


@contextmanager
def _traced_attributes(
    modules: Iterable[tuple[str, nn.Module]], ledger: Ledger
) -> Iterator[dict[int, Owner]]:
    """While this holds, integers that modules and their configurations keep know where they come from."""
    owners: dict[int, Owner] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def traced(value: Any, attr: Attr) -> Any:
        if type(value) is not int or value <= 1:
            return value
        ledger.values[attr] = value
        return TracedInt(value, attr, ledger)

    for owner in _owners(modules):
        own = vars(owner.object)
        key = id(owner.object)
        for name, value in list(own.items()):
            kind = type(value)
            if kind not in (int, tuple, list) or (name in _UNTRACED and owner.is_module):
                continue
            replaced = value
            if kind is int:
                replaced = traced(value, Attr(key, name))
            elif 0 < len(value) <= _LONGEST and all(type(x) is int for x in value):
                replaced = kind(traced(x, Attr(key, name, i)) for i, x in enumerate(value))
            if replaced is not value:
                own[name] = replaced
                undo.append((own, name, value))
                owners[key] = owner
    try:
        yield owners
    finally:
        for own, name, value in undo:
            own[name] = value


def _owners(modules: Iterable[tuple[str, nn.Module]]) -> list[Owner]:
    """Modules, and the configuration objects that they reach, each once."""
    found: list[Owner] = []
    seen: set[int] = set()

    def visit(thing: Any, module: str, steps: tuple[str | tuple[str, str], ...]) -> None:
        if id(thing) in seen or len(steps) > 3:
            return
        seen.add(id(thing))
        found.append(Owner(thing, module, steps))
        for name, value in list(vars(thing).items()):
            kind = type(value)
            if kind in _SIMPLE or (not steps and name in _PARTS):
                continue
            if isinstance(value, dict):
                for key, inner in value.items():
                    if _is_record(type(inner)) and isinstance(key, str):
                        visit(inner, module, (*steps, (name, key)))
            elif _is_record(kind):
                visit(value, module, (*steps, name))

    for path, module in modules:
        visit(module, path, ())
    return found


_RECORDS: dict[type, bool] = {}


def _is_record(kind: type) -> bool:
    """Whether values of a type are plain objects with attributes, such as configurations."""
    known = _RECORDS.get(kind)
    return _RECORDS.setdefault(kind, _keeps_attributes(kind)) if known is None else known


def _keeps_attributes(kind: type) -> bool:
    if not kind.__dictoffset__ or any("__call__" in vars(c) for c in kind.__mro__):
        return False
    if issubclass(kind, nn.Module | Tensor | type | std.ModuleType):
        return False
    return not kind.__module__.startswith(("torch.", "builtins", "numpy", "enum"))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in an output: containers, mappings, and objects with attributes."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, Mapping):
            for v in x.values():
                visit(v)
        elif isinstance(x, list | tuple | set):
            for v in x:
                visit(v)
        elif hasattr(x, "__dict__") and not isinstance(x, type | nn.Module) and id(x) not in seen:
            seen.add(id(x))
            for v in list(vars(x).values()):
                visit(v)

    visit(tree)
    return found


def cached(output: Any) -> list[Tensor]:
    """Keys and values that a model returns for its next call, `[batch, heads, tokens, head_dim]`."""
    if not isinstance(output, Mapping):
        return []
    return [t for key in output if _is_cache(key) for t in tensors_in(output[key]) if t.dim() == 4]


def results(output: Any) -> list[Tensor]:
    """What a model is run for: logits if it names any, else all that it returns but caches."""
    if isinstance(output, Mapping):
        kept = {k: v for k, v in output.items() if not _is_cache(k)}
        output = {k: v for k, v in kept.items() if k in ("logits", "loss")} or kept
    return tensors_in(output)


def _is_cache(key: Any) -> bool:
    return isinstance(key, str) and ("past_key_values" in key or "cache" in key)
