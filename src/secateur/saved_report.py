"""Reports of saved models, read again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from secateur.core.errors import ArtifactError
from secateur.dropped import DropReport
from secateur.record import Report
from secateur.shrunk import ShrinkReport

AnyReport = Report | ShrinkReport | DropReport


def load_report(path: str | os.PathLike[str]) -> AnyReport:
    """The report that `save(model, folder, report=...)` or a command wrote into a folder, or a JSON file.

    Masks and surgery are in files of their own, for `Masks.load` and `load`: the report comes without them.

    Raises:
        ArtifactError: there is no report, or something else.
    """
    file = Path(path)
    if file.is_dir():
        file /= "report.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"There is no {file}: save(model, folder, report=report) writes one, and the commands do."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}.") from None
    kinds: dict[str, type[AnyReport]] = {"layers": Report, "groups": ShrinkReport, "influence": DropReport}
    kind = next((k for name, k in kinds.items() if isinstance(data, dict) and name in data), None)
    if kind is None or "settings" not in data:
        raise ArtifactError(f"{file} is no report of pruning.")
    try:
        return kind.from_dict(data)
    except (ArtifactError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no report of pruning, or damaged: {error}") from None
