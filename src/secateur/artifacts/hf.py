"""Hugging Face models, through transformers' own saving and loading, which is imported on first use.

A model is opened from its configuration and its tensors, never by handing the folder to `from_pretrained`:
nothing else that lies there (pickles, adapters, code) can have an influence.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.artifacts.hf_config import misfit, same_config
from secateur.artifacts.hf_cut import write_cut
from secateur.artifacts.hf_folder import (
    CONFIG,
    architecture,
    quiet,
    read_config,
    read_generation_config,
    read_weights,
    settings,
    widest,
)
from secateur.artifacts.manifest import DTYPES
from secateur.artifacts.steps import Step, expressed
from secateur.artifacts.tensors import first_line, listed, refuse_unsavable
from secateur.core.errors import ArtifactError

# Tasks as transformers' pipelines name them, and the table of the classes that do each.
_TASKS = {
    "text-generation": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "text2text-generation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "automatic-speech-recognition": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "feature-extraction": "MODEL_MAPPING_NAMES",
}


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a `PreTrainedModel`, told without importing transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(model).__mro__
    )


def write_pretrained(model: Any, folder: Path, steps: Sequence[Step] = ()) -> None:
    """`save_pretrained` into `folder` if the configuration gives such a model again, else `write_cut`.

    Raises `ArtifactError` if neither the configuration nor the steps lead to the model.
    """
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise ArtifactError(
            f"{name} is quantized, which cannot be saved: prune and save the original weights."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ArtifactError(f"{name} has adapters, of which only they would be saved: merge them first.")
    refuse_unsavable(model)
    wrong = misfit(model)
    if steps and (wrong or not all(map(expressed, steps))):
        write_cut(model, steps, float_dtypes(model), folder)
        return
    if wrong:
        raise ArtifactError(
            f"{wrong}, so no config.json can express the model: pass report= or surgery= of its structured "
            "pruning, correct model.config, or save its state dict yourself."
        )
    with quiet(), same_config(model.config):
        try:
            model.save_pretrained(folder)
        except OSError:  # a full disk and the like say themselves what is wrong
            raise
        except Exception as error:
            raise ArtifactError(f"transformers cannot save {name}: {first_line(error)}") from error


def float_dtypes(model: nn.Module) -> dict[str, str]:
    """The floating-point dtypes of a state dict: "*" for the most common one, the others by name."""
    state = model.state_dict()
    found = {n: str(t.dtype).removeprefix("torch.") for n, t in state.items() if t.is_floating_point()}
    if not found:
        return {}
    common = Counter(found.values()).most_common(1)[0][0]
    return {"*": common} | {name: dtype for name, dtype in found.items() if dtype != common}


def open_pretrained(
    folder: Path, given: type | None = None, dtypes: Mapping[str, str] | None = None
) -> tuple[Any, list[str]]:
    """The model in a folder, in evaluation mode, and the names of the tensors that it does not use.

    Args:
        folder: with configuration and safetensors.
        given: the class to build, if it is the one that the configuration names; else transformers' own.
        dtypes: as from `float_dtypes`; None leaves the dtype to the configuration.

    Raises:
        ArtifactError: something is missing, corrupt, unknown or does not fit together.
    """
    config = read_config(folder)
    cls = architecture(folder, config, given)
    tensors = read_weights(folder)
    mapped = {t.untyped_storage().data_ptr() for t in tensors.values()}
    with quiet():
        try:
            model, info = cls.from_pretrained(
                None,
                config=cls.config_class.from_dict(settings(config)),
                state_dict=tensors,
                torch_dtype=widest(dtypes or {}),
                ignore_mismatched_sizes=True,  # _refuse_incomplete says better what is wrong
                output_loading_info=True,
            )
            read_generation_config(model, folder)
        except ArtifactError:
            raise
        except Exception as error:  # a configuration can be wrong in as many ways as there are architectures
            raise ArtifactError(f"transformers cannot open {folder}: {first_line(error)}") from error
    _refuse_incomplete(info, folder, cls.__name__)
    model.name_or_path = model.config.name_or_path = str(folder)
    for name, t in model.state_dict(keep_vars=True).items():
        saved = DTYPES[dtypes.get(name, dtypes["*"])] if dtypes and t.is_floating_point() else t.dtype
        # safetensors maps the file into memory: the model must not change when the file is overwritten.
        t.data = t.data.to(saved, copy=t.untyped_storage().data_ptr() in mapped)
    return model, sorted(info["unexpected_keys"])


def task_of(model: nn.Module) -> str:
    """What a model is for, as transformers' pipelines name it; "other" if none of the common tasks."""
    from transformers.models.auto import modeling_auto

    for task, table in _TASKS.items():
        for names in getattr(modeling_auto, table, {}).values():
            if type(model).__name__ in ((names,) if isinstance(names, str) else names):
                return task
    return "other"


def warn_unused(names: list[str], folder: Path, model: nn.Module) -> None:
    """Warn of tensors in a folder that are no part of the model, and so would be missing from a copy."""
    if names:
        message = f"{type(model).__name__} does not use {listed(names)} in {folder}: left out."
        warnings.warn(message, stacklevel=4)  # the caller of load or load_hf


def _refuse_incomplete(info: Mapping[str, Any], folder: Path, name: str) -> None:
    if info["mismatched_keys"]:
        key, stored, built = min(info["mismatched_keys"])
        shapes = f"{tuple(stored)} in the weights and {tuple(built)} by {CONFIG}"
        raise ArtifactError(f"The files in {folder} do not belong together: {key} is {shapes}.")
    if info["missing_keys"]:
        raise ArtifactError(
            f"The weights in {folder} lack {listed(info['missing_keys'])}, which {name} needs."
        )
    if info["error_msgs"]:
        raise ArtifactError(f"The weights in {folder} cannot be loaded: {info['error_msgs'][0]}.")
