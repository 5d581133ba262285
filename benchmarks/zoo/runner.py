"""Runs many models, each in a process of its own with a time limit and one thread, and keeps what they found.

A worker is a module started as `python -m MODULE --worker NAME`. It prints a line of JSON, an object, for
each stage that it finishes: what was printed before a crash or the time limit counts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def stage(name: str, work: Callable[[], Row]) -> bool:
    """Do one stage in a worker and print its row: what `work` returns or what went wrong, and seconds.

    A stage fails by raising, or by returning `ok` false and a `failure`.
    """
    start = time.perf_counter()
    try:
        row = {"ok": True} | work()
    except Exception as error:
        row = {"ok": False, "failure": told(error), "at": place(error)}
    row["seconds"] = round(time.perf_counter() - start, 3)
    print(json.dumps({name: row}), flush=True)
    return bool(row["ok"])


def told(error: BaseException) -> str:
    """Class and first sentence of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def place(error: BaseException) -> str:
    """Where an exception was raised: the last frame outside of torch, as file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "importlib" not in f.filename] or list(frames)
    path = own[-1].filename.rsplit("site-packages/", 1)[-1].replace(f"{ROOT}/", "")
    return f"{path}:{own[-1].lineno}"


def one(module: str, name: str, limit: float, extra: Sequence[str] = ()) -> Row:
    """The stages of one model, in a process of its own."""
    command = [sys.executable, "-m", module, "--worker", name, *extra]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | _ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the limit ends what the worker started, too
    )
    try:
        out, err = process.communicate(timeout=limit)
        ended = None if process.returncode == 0 else f"exit status {process.returncode}: {err.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        ended = f"not finished after {limit:g} s"
    stages: Row = {}
    for line in out.splitlines():
        if line.startswith("{"):
            stages |= json.loads(line)
    seconds = round(time.perf_counter() - start, 1)
    return {"name": name, "stages": stages, "ended": ended, "seconds": seconds}


def read(path: Path) -> dict[str, Row]:
    """The rows of a results file by name, the last of each."""
    if not path.is_file():
        return {}
    return {row["name"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def run(
    module: str,
    names: Iterable[str],
    out: Path,
    *,
    jobs: int,
    limit: float,
    again: bool,
    extra: Sequence[str] = (),
    verdict: Callable[[Row], str],
) -> dict[str, Row]:
    """Run the worker on every name that `out` lacks; append each row as it is ready. Returns all rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {} if again else read(out)
    todo = [name for name in names if name not in done]
    with ThreadPoolExecutor(jobs) as pool, out.open("a", encoding="utf-8") as file:
        for i, row in enumerate(pool.map(lambda name: one(module, name, limit, extra), todo), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{i}/{len(todo)} {row['name']} {row['seconds']} s: {verdict(row)}", flush=True)
    return read(out)
