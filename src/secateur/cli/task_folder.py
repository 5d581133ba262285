"""A folder of lm-eval tasks, made sure to be data: YAML and templates, no Python.

lm-eval runs what a task file names: functions (`!function`), metrics from the Hub, builders that import
classes, and templates that reach into Python. What does so is refused, and templates run in a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from secateur.artifacts.tensors import first_line
from secateur.core.errors import SecateurError

_BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # of local files, which only read
_CODE = {"class": "a Python class", "use_prompt": "prompts from elsewhere"}


def check_task_folder(folder: Path) -> None:
    """Refuse a folder whose tasks could run code of their own.

    Raises `SecateurError` if a YAML file, or one that it includes, has a tag such as `!function`, names a
    metric that lm-eval does not have, reads data by other than plain builders or data sets of the Hub, or
    lies outside the folder.
    """
    if not folder.is_dir():
        raise SecateurError(f"There is no task folder {folder}.")
    waiting = sorted(folder.glob("**/*.yaml"))
    if not waiting:
        raise SecateurError(f"{folder} holds no task: no file ends in .yaml.")
    root, seen = folder.resolve(), set[Path]()
    while waiting:
        file = waiting.pop().resolve()
        if file in seen:
            continue
        seen.add(file)
        if not file.is_relative_to(root):
            raise SecateurError(f"{folder} leads to {file}, outside of it: copy that file into the folder.")
        config = _parsed(file)
        _refuse_code(config, file)
        included = config.get("include", []) if isinstance(config, dict) else []
        waiting += [
            file.parent / str(name) for name in (included if isinstance(included, list) else [included])
        ]


@contextmanager
def sandboxed() -> Iterator[None]:
    """Templates of lm-eval cannot reach into Python meanwhile."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    kept = utils.env
    sandbox = SandboxedEnvironment(
        loader=kept.loader, undefined=kept.undefined, keep_trailing_newline=kept.keep_trailing_newline
    )
    sandbox.filters.update(kept.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = kept


def _parsed(file: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise SecateurError(
            f"{file} is more than data, and Secateur runs no code of a task: {error.problem}."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SecateurError(f"{file} cannot be read as YAML: {first_line(error)}") from None


@cache
def _metrics() -> frozenset[str]:
    from lm_eval.api import metrics  # noqa: F401  (which fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    return frozenset(METRIC_REGISTRY)


def _refuse_code(value: Any, file: Path) -> None:
    """Look through everything: a group can hold tasks, and a task may be told over."""
    if isinstance(value, list):
        for item in value:
            _refuse_code(item, file)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if (why := _why_code(key, item)) is not None:
            raise SecateurError(f"{file} has {key}: {item}, {why}; Secateur runs no code of a task.")
        _refuse_code(item, file)


def _why_code(key: Any, value: Any) -> str | None:
    if key in _CODE:
        return _CODE[key]
    if key == "hf_evaluate" and value:
        return "a script of the Hub"
    if key == "metric" and str(value) not in _metrics():
        return "which is no metric of lm-eval and would be fetched as a script"
    if key == "dataset_path" and "/" not in str(value) and value not in _BUILDERS:
        return f"which is neither a data set OWNER/NAME nor one of {', '.join(_BUILDERS)}"
    return None
