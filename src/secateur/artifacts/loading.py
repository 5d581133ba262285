"""`load` and `load_hf`: models from folders, checked before they are used."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from secateur.artifacts.hf import is_pretrained, open_pretrained, task_of, warn_unused
from secateur.artifacts.hf_cut import open_cut
from secateur.artifacts.hf_folder import CONFIG, GENERATION, weight_files
from secateur.artifacts.manifest import MASKS, NAME, PRUNED, SURGERY, WEIGHTS, Manifest
from secateur.artifacts.packed import any_name, stored_name
from secateur.artifacts.steps import check_sparse, read_steps, ready_sparse_, replay_
from secateur.artifacts.tensors import fill_, listed, read_tensors, refuse_other_ties, ties, untie
from secateur.core.errors import ArtifactError
from secateur.core.names import unwrap
from secateur.masks import Masks


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, every value and dtype as it was saved. Nothing in the files is executed.

    Size and SHA-256 of every file are checked first, and in the end that the weights which the masks remove
    are zero; the masks themselves are `Masks.load(folder / "masks.safetensors")`. A folder of a Hugging
    Face model that Secateur did not write is loaded too, without those checks.

    Where structured pruning left what no configuration describes, its surgery is done again: to `model`, or
    to a Hugging Face model that is built without its dense weights, so that loading takes the memory of
    the small one. Code that the surgery edited must be of the same version. Sparse layers are put in without
    their dense weights; a warning says so if other kernels run here than where they were measured.

    Args:
        folder: what `save` was given.
        model: a fresh model to load into, in place, in the mode and on the devices that it is. Needed unless
            the folder holds a model of a class in transformers, which is otherwise built, on the CPU and in
            evaluation mode. Parameters stay the same objects and take the saved dtypes. If the folder holds a
            surgery it is the dense model, as it was before; what is cut becomes new parameters. A model that
            was cut already is refused, since its numbers may be other ones. Only of a Hugging Face
            model whose configuration describes what is left it is the small one.

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
    if manifest.kind == "module" and model is None:
        raise ArtifactError(
            f"{folder} holds the tensors of a {manifest.class_name}, not its code: build the model "
            "and give it, load(folder, model)."
        )
    if model is not None and (manifest.kind == "module" or any_name(manifest.files, PRUNED)):
        _fill_saved(unwrap(model), manifest, masks, folder)
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


def _fill_saved(model: nn.Module, manifest: Manifest, masks: Masks | None, folder: Path) -> None:
    """Do the surgery, if there is one, to the given model, and fill it; on an error it is as it was."""
    name = PRUNED if any_name(manifest.files, PRUNED) else WEIGHTS
    _refuse_unlisted(folder, [name, SURGERY] if name == PRUNED else [name], manifest)
    tensors = untie(read_tensors(folder / name), manifest.tied, folder / name)
    steps = read_steps(folder / SURGERY) if SURGERY in manifest.files else ()
    check_sparse(steps, tensors)
    undo = replay_(model, steps, folder)
    try:
        fill_(model, tensors, manifest.tied, masks, folder)
        ready_sparse_(model, steps)
    except BaseException:
        undo()
        raise


def _open_saved(folder: Path, model: nn.Module | None, manifest: Manifest) -> nn.Module:
    is_cut = any_name(manifest.files, PRUNED)
    names = [CONFIG, PRUNED, SURGERY] if is_cut else [CONFIG, *weight_files(folder)]
    _refuse_unlisted(folder, [*names, GENERATION] if (folder / GENERATION).exists() else names, manifest)
    if is_cut:
        cut: nn.Module = open_cut(folder, manifest)
        return cut
    loaded, unused = open_pretrained(folder, _class(model), manifest.dtypes)
    if unused:
        raise ArtifactError(f"{folder} holds {listed(unused)}, which {type(loaded).__name__} does not have.")
    refuse_other_ties(loaded, manifest.tied, folder)
    built: nn.Module = loaded
    return built


def _refuse_unlisted(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Nothing may be read that was not checked."""
    for name in (stored_name(folder, name) for name in names):
        if name not in manifest.files:
            raise ArtifactError(
                f"{folder / name} is not listed in {NAME}: it was added or {NAME} is damaged."
            )


def _class(model: nn.Module | None) -> type | None:
    return type(unwrap(model)) if model is not None and is_pretrained(unwrap(model)) else None


def _filled(model: nn.Module, loaded: nn.Module, masks: Masks | None, folder: Path) -> nn.Module:
    fill_(unwrap(model), loaded.state_dict(), ties(loaded), masks, folder)
    return model
