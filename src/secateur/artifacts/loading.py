"""`load` and `load_hf`: models from folders, checked before they are used."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from secateur.artifacts.hf import is_pretrained, open_pretrained, task_of, warn_unused
from secateur.artifacts.hf_folder import CONFIG, GENERATION, weight_files
from secateur.artifacts.manifest import MASKS, NAME, WEIGHTS, Manifest
from secateur.artifacts.tensors import fill_, listed, read_tensors, refuse_other_ties, ties, untie
from secateur.core.errors import ArtifactError
from secateur.core.names import unwrap
from secateur.masks import Masks


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, every value and dtype as it was saved. Nothing in the files is executed.

    Size and SHA-256 of every file are checked first, and in the end that the weights which the masks remove
    are zero; the masks themselves are `Masks.load(folder / "masks.safetensors")`. A folder of a Hugging
    Face model that Secateur did not write is loaded too, without those checks.

    Args:
        folder: what `save` was given.
        model: a fresh model to load into, in place, in the mode and on the devices that it is. Needed unless
            the folder holds a model of a class in transformers, which is otherwise built, on the CPU and in
            evaluation mode. Parameters stay the same objects and take the saved dtypes.

    Returns:
        `model`, or the one that was built.

    Raises:
        ArtifactError: a file is missing, cut short, corrupt or of another kind; names, shapes or ties differ
            from those of `model`, which is then unchanged.
        MaskError: the masks do not fit the weights; `model` is then unchanged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}.")
    if not (folder / NAME).is_file():
        if not (folder / CONFIG).is_file():
            raise ArtifactError(
                f"{folder} holds no model: neither Secateur's {NAME} nor Hugging Face's {CONFIG}."
            )
        loaded = _open_plain(folder, model)
        return loaded if model is None else _filled(model, loaded, None, folder)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    masks = Masks.load(folder / MASKS) if MASKS in manifest.files else None
    if manifest.kind == "module":
        if model is None:
            raise ArtifactError(
                f"{folder} holds the tensors of a {manifest.class_name}, not its code: build the model "
                "and give it, load(folder, model)."
            )
        _refuse_unlisted(folder, [WEIGHTS], manifest)
        tensors = untie(read_tensors(folder / WEIGHTS), manifest.tied, folder / WEIGHTS)
        fill_(unwrap(model), tensors, manifest.tied, masks, folder)
        return model
    loaded = _open_saved(folder, model, manifest)
    if model is not None:
        return _filled(model, loaded, masks, folder)
    if masks is not None:
        masks.check(loaded)
    return loaded


def load_hf(folder: str | os.PathLike[str]) -> tuple[nn.Module, str]:
    """Open a folder of a Hugging Face model, by Secateur or anyone, and say what the model is for.

    Only `config.json`, `generation_config.json` and safetensors are read, without progress bars and
    messages. Tensors that the model does not use are warned of.

    Returns:
        The model, in evaluation mode and in the dtype of its configuration, and its task as transformers'
        pipelines call it: "text-generation", "fill-mask", "text-classification", "image-classification",
        "feature-extraction", ..., or "other".

    Raises:
        ArtifactError: the folder, its configuration or its weights are missing, corrupt, pickled, quantized,
            or of an architecture that transformers lacks; or transformers is not installed.
    """
    folder = Path(folder)
    model = load(folder) if (folder / NAME).is_file() else _open_plain(folder, None)
    return model, task_of(model)


def _open_plain(folder: Path, model: nn.Module | None) -> nn.Module:
    loaded, unused = open_pretrained(folder, _class(model))
    warn_unused(unused, folder, loaded)
    built: nn.Module = loaded
    return built


def _open_saved(folder: Path, model: nn.Module | None, manifest: Manifest) -> nn.Module:
    names = [CONFIG, *weight_files(folder)]
    _refuse_unlisted(folder, [*names, GENERATION] if (folder / GENERATION).exists() else names, manifest)
    loaded, unused = open_pretrained(folder, _class(model), manifest.dtypes)
    if unused:
        raise ArtifactError(f"{folder} holds {listed(unused)}, which {type(loaded).__name__} does not have.")
    refuse_other_ties(loaded, manifest.tied, folder)
    built: nn.Module = loaded
    return built


def _refuse_unlisted(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Nothing may be read that was not checked."""
    for name in names:
        if name not in manifest.files:
            raise ArtifactError(
                f"{folder / name} is not listed in {NAME}: it was added or {NAME} is damaged."
            )


def _class(model: nn.Module | None) -> type | None:
    return type(unwrap(model)) if model is not None and is_pretrained(unwrap(model)) else None


def _filled(model: nn.Module, loaded: nn.Module, masks: Masks | None, folder: Path) -> nn.Module:
    fill_(unwrap(model), loaded.state_dict(), ties(loaded), masks, folder)
    return model
