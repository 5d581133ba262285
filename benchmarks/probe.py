"""Peak memory of a piece of code, and the machine it ran on."""

from __future__ import annotations

import os
import platform
import threading
import time
from types import TracebackType

import torch


def machine() -> dict[str, str]:
    """What a reader needs to compare figures."""
    model = "unknown"
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def anonymous_mib() -> float:
    """Resident anonymous memory of this process (heap and tensors, not mapped libraries), in MiB."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) / 1024


class PeakMemory:
    """Context manager: `extra` is the highest anonymous memory above that on entry, in MiB, sampled."""

    extra: float = 0.0

    def __enter__(self) -> PeakMemory:
        self._base = anonymous_mib()
        self._peak = self._base
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, anonymous_mib())
            time.sleep(0.001)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(self._peak, anonymous_mib()) - self._base
