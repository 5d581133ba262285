"""`save`: a model into a folder that checks itself when it is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from secateur.artifacts.folder import written_at_once
from secateur.artifacts.hf import float_dtypes, is_pretrained, write_pretrained
from secateur.artifacts.manifest import MASKS, SURGERY, WEIGHTS, Manifest, fingerprints, is_plain_name
from secateur.artifacts.packed import pack_file
from secateur.artifacts.sparse import Sparse
from secateur.artifacts.steps import Step, Surgery, as_steps, refuse_other_surgery, write_steps
from secateur.artifacts.tensors import refuse_unsavable, ties, write_tensors
from secateur.core.errors import ArtifactError
from secateur.core.files import write_text
from secateur.core.names import unwrap
from secateur.dropped import DropReport
from secateur.layers import DropRecord
from secateur.masks import Masks
from secateur.record import Report
from secateur.shrunk import ShrinkReport
from secateur.surgery import Cuts

REPORT = "report.json"
# What a tokenizer or a preprocessor is made of. Never code: the patterns name data files only.
_COMPANIONS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "tekken.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "*processor_config.json",
)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    report: Report | ShrinkReport | DropReport | None = None,
    masks: Masks | None = None,
    surgery: Surgery | None = None,
    source: str | os.PathLike[str] | None = None,
    compressed: bool = False,
) -> None:
    """Write a model, with its masks, surgery and report, into a folder for `load`; wholly or not at all.

    A Hugging Face model that its configuration describes is written by its own `save_pretrained`, so that
    plain `from_pretrained` loads the folder; structured pruning that makes all layers equally smaller leaves
    such a model. Of any other module the tensors of the state dict are written, tied ones once. The folder
    holds

        model.safetensors     or shards, and for a Hugging Face model config.json and generation_config.json
        masks.safetensors     one bit a weight, if there are masks
        surgery.json          what structured pruning cut and dropped, in order, if it did
        report.json           if there is a report
        secateur.json         written last: kind, ties, settings, size and SHA-256 of every file

    A Hugging Face model whose configuration cannot describe what structured pruning left (layers of
    different widths, fewer heads than the width says) is for `load` alone: `config.json` is that of the
    dense model, and the tensors are in `pruned.safetensors`, where `from_pretrained` does not find them. It
    raises an error, instead of making up the weights that are gone.

    The same holds for a model with sparse layers, from `runtime.compress`: their packed weights are written
    as they are, int8 too, and `load` gives the sparse model. Its zeros are in no `masks.safetensors`.

    Args:
        model: any module; wrappers of `torch.compile` and data parallelism are looked through.
        folder: made if it does not exist. An earlier artifact in it is replaced, other files are left alone.
        report: of the pruning.
        masks: of the model; those of the report if None.
        surgery: `Cuts`, as in `plan.cuts` and `report.cuts`, and the `DropRecord` of dropped blocks, all that
            were carried out, in order; or the folder of an earlier `save` that holds them. That of the report
            if None.
        source: the folder that the model came from: its tokenizer and preprocessor files are copied.
        compressed: store tensors with many zeros as one bit an entry and the entries that are not zero, in
            `model.packed.safetensors`. A bfloat16 matrix with 50 % zeros takes 56 % of its bytes. `load`
            gives the same dense model, to the bit; `from_pretrained` finds no weights in such a folder.

    Raises:
        ArtifactError: the folder holds something that is not an artifact; the model's state is not made of
            dense tensors; neither its configuration nor the surgery describes it.
        MaskError: the masks do not fit the model, or a weight that they remove is not zero.
    """
    model = unwrap(model)
    folder = Path(folder)
    sparse = Sparse.of(model)
    if masks is not None and sparse is not None:
        raise ArtifactError("masks= are of the dense model, and this one has sparse layers: leave them out.")
    if masks is None and isinstance(report, Report) and sparse is None:
        masks = report.masks
    if masks is not None:
        masks.check(model)
    if surgery is None:
        surgery = _surgery_of(report)
    steps: tuple[Step, ...] = tuple(s for s in as_steps(surgery) if not isinstance(s, Sparse))
    steps = steps if sparse is None else (*steps, sparse)
    refuse_other_surgery(model, steps)
    beside = list(companions(Path(source))) if source is not None else []
    pretrained = is_pretrained(model)
    with written_at_once(folder) as new:
        if pretrained:
            write_pretrained(model, new, steps)
        else:
            refuse_unsavable(model)
            write_tensors(model, new / WEIGHTS)
        if compressed:
            for path in sorted(new.glob("*.safetensors")):
                pack_file(path)
        for path in beside:
            shutil.copyfile(path, new / path.name)
        if masks is not None:
            masks.save(new / MASKS)
        if steps:
            write_steps(steps, new / SURGERY)
        if report is not None:
            write_report(report, new)
        Manifest(
            "hf" if pretrained else "module",
            f"{type(model).__module__}.{type(model).__qualname__}",
            fingerprints(new.iterdir()),
            ties(model),
            float_dtypes(model) if pretrained else {},
            dict(report.settings) if report is not None else {},
        ).write(new)


def write_report(report: Report | ShrinkReport | DropReport, folder: Path) -> None:
    """Write `report.json`, without the surgery, which has its own file."""
    data = {k: v for k, v in report.to_dict().items() if k not in ("surgery", "record")}
    write_text(folder / REPORT, json.dumps(data, indent=1) + "\n")


def _surgery_of(report: Report | ShrinkReport | DropReport | None) -> tuple[Cuts | DropRecord, ...]:
    if isinstance(report, ShrinkReport):
        return report.cuts
    return (report.record,) if isinstance(report, DropReport) else ()


def companions(source: Path) -> Iterator[Path]:
    """Tokenizer and preprocessor files of a folder."""
    if not source.is_dir():
        raise ArtifactError(f"source={source} is no folder: give the folder that the model was loaded from.")
    for pattern in _COMPANIONS:
        yield from (
            path for path in sorted(source.glob(pattern)) if path.is_file() and is_plain_name(path.name)
        )
