"""What lies in a Hugging Face folder: the configuration, the class that it names, the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from secateur.artifacts.manifest import DTYPES, PRUNED, WEIGHTS, is_plain_name, read_json
from secateur.artifacts.packed import stored_name
from secateur.artifacts.tensors import first_line, listed, read_tensors
from secateur.core.errors import ArtifactError

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FOLDER = f"a Hugging Face model folder holds {CONFIG} and {WEIGHTS}, or shards with {INDEX}"


def import_transformers() -> ModuleType:
    """The module, on first use; `ArtifactError` if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ArtifactError("Hugging Face models need transformers: pip install secateur[hf].") from None
    module: ModuleType = transformers
    return module


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, unless the folder says that it holds something else than a whole, plain model."""
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}: {_FOLDER}, and is downloaded from the Hub first.")
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder} has no {CONFIG}: {_FOLDER}.")
    config = read_json(folder / CONFIG)
    if (folder / "adapter_config.json").exists():
        raise ArtifactError(
            f"{folder} holds an adapter (adapter_config.json): merge it into its model first."
        )
    if config.get("quantization_config"):
        raise ArtifactError(f"The model in {folder} is quantized: open the original weights instead.")
    return config


def architecture(folder: Path, config: dict[str, Any], given: type | None) -> Any:
    """The class that a configuration names: `given` if that is its name, else transformers' own."""
    transformers = import_transformers()
    path, names = folder / CONFIG, config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ArtifactError(f'{path} does not name the model\'s class: add "architectures": ["..."].')
    name = names[0]
    try:
        cls: Any = given if given and given.__name__ == name else getattr(transformers, name, None)
    except (ImportError, RuntimeError) as error:  # the class is there, a package that it needs is not
        raise ArtifactError(f"{name}, named in {path}, cannot be imported: {first_line(error)}") from None
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known or getattr(cls, "config_class", None) is None:
        raise ArtifactError(
            f"{path} names the architecture {name!r}, which transformers {transformers.__version__} does not "
            "have: update transformers, or pass the model; code that comes with a model is not run."
        )
    expected = cls.config_class.model_type
    if expected and config.get("model_type", expected) != expected:
        raise ArtifactError(f"{path} has model_type {config['model_type']!r}, but {name} is {expected!r}.")
    return cls


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from shards."""
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder):
        part = read_tensors(folder / name)
        if twice := part.keys() & tensors.keys():
            raise ArtifactError(f"{folder / name} holds {listed(twice)}, which another shard holds too.")
        tensors.update(part)
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the model; `ArtifactError` if there are none."""
    if (folder / stored_name(folder, WEIGHTS)).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        return _shards(index)
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise ArtifactError(
            f"{folder} has its weights only as a pickle ({listed(pickles)}), which can run code when opened: "
            "where you trust it, convert it to safetensors with transformers' save_pretrained."
        )
    if (folder / stored_name(folder, PRUNED)).is_file():
        raise ArtifactError(
            f"The weights in {folder} are in {PRUNED}, which secateur.load alone opens: no configuration "
            "describes this model."
        )
    raise ArtifactError(f"{folder} has no weights: {_FOLDER}.")


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise ArtifactError(f"{index} has no valid weight_map.")
    names = sorted(set(shards.values()))
    for name in names:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ArtifactError(f"{index} lists {name!r}, which is no safetensors file beside it: refused.")
        if not (index.parent / stored_name(index.parent, name)).is_file():
            raise ArtifactError(f"{index.parent / name} is missing: {index.name} lists it, so copy it again.")
    return names


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and messages: what matters is raised."""
    import_transformers()
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def settings(value: Any) -> Any:
    """The values of a `config.json`, as a configuration's constructor takes them.

    Floats that JSON has no number for are written by transformers as `{"__float__": "Infinity"}`. The choice
    of kernels is left out: it could name code on the Hub to fetch and run.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        kernels = ("attn_implementation", "experts_implementation")
        return {k: settings(v) for k, v in value.items() if not any(word in k for word in kernels)}
    return [settings(v) for v in value] if isinstance(value, list) else value


def widest(dtypes: Mapping[str, str]) -> torch.dtype | str:
    """The type that holds the values of all, so that what is narrower can be restored exactly."""
    found: torch.dtype | None = None
    for name in dtypes.values():
        found = DTYPES[name] if found is None else torch.promote_types(found, DTYPES[name])
    return found or "auto"


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model that generates the settings in a folder."""
    if not model.can_generate():
        return
    read = import_transformers().GenerationConfig.from_pretrained
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)  # says which file is wrong
        model.generation_config = read(folder, local_files_only=True)
    else:  # older folders keep these settings in config.json
        model.generation_config = read(folder, CONFIG, _from_model_config=True, local_files_only=True)
