"""Hugging Face models that no configuration describes: the dense one is built again, and changed again.

The folder holds the configuration of the dense model, the surgery, and the tensors that are left. They lie
in `pruned.safetensors`, under the model's own names, so that plain `from_pretrained`, which would build the
dense model and fill what is missing with random values, finds no weights and says so.

transformers' `per_layer_config` is not written: its Llama, among others, builds every layer from the common
fields whatever it says (5.23).
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from secateur.artifacts.hf_config import dense_config, difference, is_theirs, same_config
from secateur.artifacts.hf_folder import (
    CONFIG,
    architecture,
    quiet,
    read_config,
    read_generation_config,
    settings,
    widest,
)
from secateur.artifacts.manifest import PRUNED, SURGERY, Manifest, read_json
from secateur.artifacts.steps import Step, check_sparse, read_steps, ready_sparse_, replay_
from secateur.artifacts.tensors import (
    first_line,
    read_tensors,
    refuse_misfit,
    refuse_other_ties,
    untie,
    write_tensors,
)
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text

_NOTE = "secateur"  # the key of config.json that tells a reader what it describes
_TEXT = (
    "This is the configuration of the dense model. The weights are in pruned.safetensors: load the folder "
    "with secateur.load, which does the surgery in surgery.json again. from_pretrained cannot load it."
)


def write_cut(model: Any, steps: Sequence[Step], dtypes: Mapping[str, str], folder: Path) -> None:
    """The dense model's configuration and what is left of the tensors, provided that the steps lead there."""
    name = type(model).__name__
    with quiet(), same_config(model.config), dense_config(model, steps):
        config = copy.deepcopy(model.config)
        if is_theirs(type(model)):
            fresh = build(type(model), copy.deepcopy(config), widest(dtypes))
            undo = replay_(fresh, steps, Path(SURGERY))
            undone = difference(model, fresh, "after the surgery of the dense one")
            undo()
            if undone:
                raise ArtifactError(f"{undone}: give all steps that the model went through, in order.")
        try:
            config.architectures = [name]
            config.dtype = str(model.dtype).removeprefix("torch.")
            config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            raise ArtifactError(f"transformers cannot save {name}: {first_line(error)}") from error
    data = read_json(folder / CONFIG) | {_NOTE: _TEXT}
    write_text(folder / CONFIG, json.dumps(data, indent=2) + "\n")
    write_tensors(model, folder / PRUNED)


def open_cut(folder: Path, manifest: Manifest) -> Any:
    """The model in a folder that `write_cut` wrote, in evaluation mode; its dense weights are never made."""
    config = {k: v for k, v in read_config(folder).items() if k != _NOTE}
    cls = architecture(folder, config, None)
    tensors = untie(read_tensors(folder / PRUNED), manifest.tied, folder / PRUNED)
    steps = read_steps(folder / SURGERY)
    with quiet():
        try:
            made = cls.config_class.from_dict(settings(config))
            model = build(cls, made, widest(manifest.dtypes))
            read_generation_config(model, folder)
        except ArtifactError:
            raise
        except Exception as error:  # a configuration can be wrong in as many ways as there are architectures
            raise ArtifactError(f"transformers cannot open {folder}: {first_line(error)}") from error
    check_sparse(steps, tensors)
    undo = replay_(model, steps, folder)
    try:
        refuse_misfit(model.state_dict(), tensors, folder, cls.__name__)
        _set(model, tensors)
        refuse_other_ties(model, manifest.tied, folder)
        ready_sparse_(model, steps)
    except BaseException:
        undo()  # the model is given up, but calls may have been edited
        raise
    model.name_or_path = model.config.name_or_path = str(folder)
    return model.eval()


def build(cls: Any, config: Any, dtype: torch.dtype | str) -> Any:
    """A model with parameters on the meta device and everything else with the values of its constructor.

    Tables that are not saved (rotary frequencies) so have the values that `from_pretrained` gives them.
    """
    options = {} if isinstance(dtype, str) else {"dtype": dtype}
    with _parameters_on_meta():
        return cls._from_config(config, **options)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While this holds, parameters that this thread gives to modules lose their values, once each."""
    # Weak, else the memory of all parameters together would be reserved, though never touched.
    made = WeakIdKeyDictionary()
    here = threading.get_ident()

    def emptied(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != here or p.is_meta:
            return None
        if p not in made:  # the same object under another name stays the same
            made[p] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        return cast(nn.Parameter, made[p])

    # torch's stub has None for the result, its documentation a parameter.
    handle = register_module_parameter_registration_hook(cast(Any, emptied))
    try:
        yield
    finally:
        handle.remove()


def _set(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every place that holds a tensor of the state dict the saved one, in the saved type."""
    new: dict[int, Tensor] = {}
    old = model.state_dict(keep_vars=True)  # alive, so that an id means one tensor
    for name, t in old.items():
        if id(t) not in new:
            # safetensors maps the file into memory: the model must not change when the file is overwritten.
            value = tensors[name].clone()
            new[id(t)] = nn.Parameter(value, t.requires_grad) if isinstance(t, nn.Parameter) else value
    for module in model.modules():
        for key, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None and id(t) in new:
                setattr(module, key, new[id(t)])  # recurrent layers list their weights anew
