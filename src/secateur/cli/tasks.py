"""Tasks of EleutherAI's lm-eval on a model."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from secateur.artifacts.tensors import first_line
from secateur.cli.data import open_tokenizer
from secateur.cli.task_folder import check_task_folder, sandboxed
from secateur.core.errors import SecateurError

_BATCH = 8


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name in lm-eval.
        metric: its name there, and the filter of the answers where there are several.
        value: as lm-eval gives it.
        stderr: standard error over the examples; None where lm-eval has none.
        n: examples.
        shots: worked examples in each prompt.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    shots: int | None


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval found.

    Attributes:
        scores: in the order of the tasks.
        limit: examples of each task, from the beginning; None for all.
        harness: name and version of lm-eval.
    """

    scores: tuple[Score, ...]
    limit: int | None
    harness: str


@dataclass(frozen=True)
class Suite:
    """Tasks found but not yet run."""

    names: tuple[str, ...]
    manager: Any
    folder: Path | None


def find_tasks(names: tuple[str, ...], folder: Path | None) -> Suite:
    """The tasks in `folder`, or of lm-eval itself without one. Nothing is fetched."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SecateurError("Tasks are run by the package lm_eval: pip install 'secateur[eval]'.") from None
    if folder is not None:
        check_task_folder(folder)
    with _quiet():
        # Only what was checked: a task of the folder could name any other.
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for name in names:
        if name not in manager.all_tasks:
            raise SecateurError(_unknown(name, manager.all_tasks, folder))
    return Suite(names, manager, folder)


def _unknown(name: str, known: list[str], folder: Path | None) -> str:
    if folder is not None:
        return f"There is no task {name} in {folder}, which has {', '.join(known) or 'none'}."
    near = get_close_matches(name, known, 5)
    return f"lm-eval has no task {name}." + (f" Close to it: {', '.join(near)}." if near else "")


def run_tasks(suite: Suite, model: nn.Module, task: str, model_dir: Path, limit: int | None) -> TaskScores:
    """Run every task of `suite`; what lm-eval raises becomes one sentence."""
    if task not in ("text-generation", "text2text-generation"):
        raise SecateurError(f"Tasks are for language models, and {model_dir} holds one for {task}.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = open_tokenizer(model_dir)
    asked = ", ".join(suite.names)
    try:
        with ExitStack() as around:
            around.enter_context(_quiet())
            if suite.folder is not None:
                around.enter_context(sandboxed())
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
                tasks=list(suite.names),
                task_manager=suite.manager,
                limit=limit,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise SecateurError(
            f"The data of {asked} cannot be had: {first_line(error)} lm-eval fetches it from the Hugging "
            "Face Hub, or reads the files that the task names."
        ) from None
    except Exception as error:  # of lm-eval, datasets, jinja2 and the model, with no common base
        raise SecateurError(
            f"lm-eval cannot run {asked}: {type(error).__name__}, {first_line(error)}"
        ) from None
    return TaskScores(tuple(_scores(found)), limit, f"lm_eval {version('lm_eval')}")


def score_table(found: TaskScores) -> Table:
    """For a terminal."""
    table = Table("Task", "Metric")
    for name in ("Value", "± std. error", "Examples", "Shots"):
        table.add_column(name, justify="right")
    for s in found.scores:
        stderr = "" if s.stderr is None else f"{s.stderr:.4f}"
        counts = ("" if n is None else f"{n:,}" for n in (s.n, s.shots))
        table.add_row(s.task, s.metric, f"{s.value:.4f}", stderr, *counts)
    return table


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    for task, metrics in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", metrics.get("sample_len"))
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            yield Score(
                task,
                metric if kind == "none" else f"{metric} ({kind})",
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                n,
                found.get("n-shot", {}).get(task),
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """No log of lm-eval, and its progress bars only where a person watches."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ExitStack() as around:
            if not sys.stderr.isatty():
                around.enter_context(redirect_stderr(io.StringIO()))
            yield
    finally:
        log.setLevel(level)
