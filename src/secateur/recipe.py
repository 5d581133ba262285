"""Recipes: what to prune and how to train meanwhile, declared in YAML with the names and settings of the API.

A recipe is data: names stand for the constructors listed here and nothing else, and nothing in a file is
executed.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from secateur import allocation, criteria, patterns, schedules, solvers, training
from secateur.core.errors import SecateurError
from secateur.core.names import Where
from secateur.prune import prune_
from secateur.stream.tuning import Reconstruct

ALLOCATIONS: dict[str, Any] = {
    f.__name__: f for f in (allocation.uniform, allocation.global_, allocation.erk, allocation.lamp)
} | {"owl": allocation.owl, "threshold": allocation.threshold}

CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        *(criteria.Magnitude, criteria.Random, criteria.Taylor, criteria.TaylorSquared, criteria.OBD),
        *(criteria.SNIP, criteria.GraSP, criteria.SynFlow, criteria.Wanda, criteria.RIA),
        *(solvers.SparseGPT, solvers.ALPS, solvers.Select, Reconstruct),
        *(patterns.Unstructured, patterns.PerRow, patterns.NM, patterns.Block),
        *(allocation.OWL, allocation.Threshold, allocation.custom, allocation.at_least),
        *(schedules.cubic, schedules.linear, schedules.exponential, schedules.cosine),
        *(schedules.constant, schedules.one_shot, schedules.every),
        *(training.RigL, training.SET, training.Soft, training.L1, training.L2),
        *(training.Phases, training.phases, Where),
    )
}

# Arguments of theirs that are texts of their own, not names of constructors.
TEXTS = frozenset({"blocks", "hidden", "kinds"})
# What a run brings itself.
BROUGHT = frozenset({"model", "graph", "batches", "loss", "stats", "example", "student", "teacher"})

METHODS: dict[str, type[training.Method]] = {
    f.__name__: f
    for f in (
        *(training.Gradual, training.Movement, training.Dynamic, training.ACDC, training.STR),
        *(training.L0, training.GroupLasso, training.Regularize, training.Growing),
        training.UnitMovement,
    )
}


@dataclass(frozen=True)
class Training:
    """How the weights that stay are trained: AdamW, warm-up, then a linear fall to zero.

    Attributes:
        steps: optimizer steps.
        method: one of `METHODS` with its settings; None holds the zeros that are there.
        batch: examples of a step.
        rate: learning rate.
        warmup: steps.
        decay: weight decay.
        clip: largest norm of the gradient.
        distill: settings of `Distill`, with the model as it was as teacher; None for none.
    """

    steps: int
    method: Any = None
    batch: int = 8
    rate: float = 1e-4
    warmup: int = 0
    decay: float = 0.01
    clip: float = 1.0
    distill: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise SecateurError(f"train: a warm-up of {self.warmup} steps is longer than {self.steps}.")

    def __str__(self) -> str:
        parts = [
            f"{self.steps} steps of {self.batch} examples",
            f"AdamW, rate {self.rate:g}" + (f" after {self.warmup} steps of warm-up" if self.warmup else ""),
            f"falling to zero, weight decay {self.decay:g}, gradients up to a norm of {self.clip:g}",
        ]
        if self.distill is not None:
            settings = ", ".join(f"{name} {value}" for name, value in self.distill.items())
            parts.append("the dense model as teacher" + (f" ({settings})" if settings else ""))
        return ", ".join(parts)


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        model: a Hugging Face model folder.
        data: file to calibrate and train on.
        out: folder for the result.
        evaluate: file to measure the loss on before and after; `eval` in YAML.
        samples: examples of each file, at most.
        length: tokens of an example, at most.
        seed: of the order of the data and of everything drawn.
        prune: arguments of `prune_`, carried out first; None for none.
        train: training afterwards; None for none.
    """

    model: Path | None = None
    data: Path | None = None
    out: Path | None = None
    evaluate: Path | None = None
    samples: int = 512
    length: int = 256
    seed: int = 0
    prune: Mapping[str, Any] | None = None
    train: Training | None = None

    def filled(self, **given: Any) -> Recipe:
        """With these fields instead, where they are not None; `SecateurError` if one is missing then."""
        done = replace(self, **{k: v for k, v in given.items() if v is not None})
        missing = [k for k in ("model", "data", "out") if getattr(done, k) is None]
        if missing:
            raise SecateurError(
                f"The recipe lacks {' and '.join(missing)}: add that, or give --{', --'.join(missing)}."
            )
        return done


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def find(name: str | os.PathLike[str]) -> Path:
    """A recipe's file, or that of one that is shipped under this name."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    if str(name) not in shipped():
        raise SecateurError(_unknown("recipe", str(name), shipped()))
    return shipped()[str(name)]


def load(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe; `SecateurError` names what is wrong and where."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise SecateurError("Recipes are YAML files: pip install pyyaml.") from None
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _loader(yaml))
    except OSError as error:
        raise SecateurError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path} is not a YAML file: {error}.") from None
    return of(data)


def _loader(yaml: Any) -> Any:
    """Safe, with numbers as YAML 1.2 and JSON have them: to YAML 1.1 `1e-4` is a text and `2:4` is 124."""
    whole, real = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [(tag, pattern) for tag, pattern in known if tag not in (whole, real)]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    digits = list("-+.0123456789")
    Loader.add_implicit_resolver(whole, re.compile(r"[-+]?(0|[1-9][0-9]*)\Z"), digits)
    number = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
    Loader.add_implicit_resolver(real, re.compile(number), digits)
    return Loader


def of(data: Any) -> Recipe:
    """A recipe from plain data, as YAML gives it."""
    if not isinstance(data, dict):
        raise SecateurError("A recipe is a mapping with model, data, out, and prune or train, or both.")
    data = {("evaluate" if k == "eval" else k): v for k, v in data.items()}
    _check_keys("the recipe", data, [f.name for f in fields(Recipe)])
    if data.get("prune") is None and data.get("train") is None:
        raise SecateurError("The recipe neither prunes nor trains: add prune: or train:.")
    for name in ("model", "data", "out", "evaluate"):
        if data.get(name) is not None:
            data[name] = Path(str(data[name]))
    if data.get("train") is not None:
        given = _mapping("train", data["train"])
        _check_keys("train", given, [f.name for f in fields(Training)])
        if "steps" not in given:
            raise SecateurError("train: needs steps, the number of optimizer steps.")
        _check_numbers(given)
        if given.get("distill") is not None:
            _check_keys("train.distill", _mapping("train.distill", given["distill"]), names(training.Distill))
        data["train"] = Training(**given)
        if data["train"].method is not None:
            _check_method(data["train"].method)
        elif data.get("prune") is None:
            raise SecateurError("The recipe trains, but nothing prunes: add prune:, or a method to train:.")
    if data.get("prune") is not None:
        given = _mapping("prune", data["prune"])
        _check_keys("prune", given, names(prune_))
        built("prune", given)
    return Recipe(**data)


def names(f: Callable[..., Any]) -> list[str]:
    """Arguments that a recipe may give: all but what a run brings itself."""
    return [name for name in inspect.signature(f).parameters if name not in BROUGHT]


def built(where: str, given: Any) -> Any:
    """A value of a recipe as the object that it names.

    A name is a constructor without arguments, or an allocation; a mapping of one name is a call: with
    keywords from a mapping, positions from a list, one argument otherwise. Other mappings and lists are taken
    entry by entry, other values as they are.
    """
    if isinstance(given, str):
        if given in ALLOCATIONS:
            return ALLOCATIONS[given]
        return call(f"{where}.{given}", _named(where, given), None)
    if isinstance(given, dict):
        if len(given) == 1 and (name := next(iter(given))) in CONSTRUCTORS:
            return call(f"{where}.{name}", CONSTRUCTORS[name], given[name])
        return {key: built(f"{where}.{key}", value) for key, value in given.items()}
    return [built(where, value) for value in given] if isinstance(given, list) else given


def call(where: str, f: Callable[..., Any], given: Any, **more: Any) -> Any:
    """`f` with arguments of a recipe, and `more` where f takes them and the recipe does not give them."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(given, dict):
        # Globs of `Where` and names of layers are texts, not names of constructors.
        plain = f is Where or f is allocation.custom
        if f is allocation.custom:
            args = (dict(given),)
        else:
            _check_keys(where, given, names(f))
            kwargs = {k: v if plain or k in TEXTS else built(f"{where}.{k}", v) for k, v in given.items()}
            kwargs = {k: tuple(v) if plain and isinstance(v, list) else v for k, v in kwargs.items()}
    elif isinstance(given, list):
        args = tuple(built(where, value) for value in given)
        args = (args,) if f is training.Phases else args
    elif given is not None:
        args = (built(where, given),)
    taken = list(inspect.signature(f).parameters)
    kwargs |= {k: v for k, v in more.items() if k in taken and k not in kwargs}
    try:
        inspect.signature(f).bind(*args, **kwargs)
    except TypeError as error:
        raise SecateurError(f"{where}: {error}; it takes {', '.join(taken)}.") from None
    try:
        return f(*args, **kwargs)
    except SecateurError as error:
        raise type(error)(f"{where}: {error}") from None
    except TypeError as error:
        if f not in CONSTRUCTORS.values():
            raise  # of a whole run, it is no fault of the recipe's
        # A text where a number belongs.
        raise SecateurError(f"{where}: {error}.") from None


def method_of(given: Any, model: Any, **more: Any) -> training.Method:
    """The method of a recipe on a model; `more`: what methods may take besides (graph, batches, loss)."""
    name, settings = _method_of(given)
    found: training.Method = call(f"train.method.{name}", METHODS[name], settings, model=model, **more)
    return found


def takes_graph(given: Any) -> bool:
    """Whether a method works on the groups of a graph."""
    return "graph" in inspect.signature(METHODS[_method_of(given)[0]]).parameters


def _method_of(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, dict) and len(given) == 1:
        name, settings = next(iter(given.items()))
        if name in METHODS:
            return name, _mapping(f"train.method.{name}", settings or {})
        raise SecateurError(_unknown("train.method", name, METHODS))
    raise SecateurError(
        f"train.method is one of {', '.join(METHODS)} with its settings, as a mapping; got {given!r}."
    )


def _check_method(given: Any) -> None:
    """Names and settings, before a model is loaded."""
    name, settings = _method_of(given)
    where = f"train.method.{name}"
    _check_keys(where, settings, names(METHODS[name]))
    for key, value in settings.items():
        if key not in TEXTS:
            built(f"{where}.{key}", value)


def _named(where: str, name: str) -> Callable[..., Any]:
    if name in CONSTRUCTORS:
        return CONSTRUCTORS[name]
    raise SecateurError(_unknown(where, name, {**CONSTRUCTORS, **ALLOCATIONS}))


def _mapping(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise SecateurError(f"{where} is a mapping of settings; got {given!r}.")
    return given


def _check_keys(where: str, given: Mapping[Any, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise SecateurError(_unknown(where, str(key), known))


def _check_numbers(given: Mapping[str, Any]) -> None:
    whole, real = (int,), (int, float)
    for name, kinds, least in (
        ("steps", whole, 1),
        ("batch", whole, 1),
        ("warmup", whole, 0),
        ("rate", real, 0),
        ("decay", real, 0),
        ("clip", real, 0),
    ):
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            raise SecateurError(f"train: {name} is a number of at least {least}; got {value!r}.")


def _unknown(where: str, name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
    return f"{where}: {name!r} is not known; {hint}"
