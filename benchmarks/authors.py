"""The authors' own code of published solvers, run beside ours from a checkout; none of it is kept here.

    git clone https://github.com/IST-DASLab/sparsegpt
    git clone https://github.com/mazumder-lab/ALPS

Their files are read as they are, but for the name of the device, which both fix to the first GPU, and for
progress that they print. `quant`, which SparseGPT imports for quantisation, is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_GPU = "cuda:0"


@dataclass(frozen=True)
class Authors:
    """Modules made of the authors' files, and the digests of these."""

    sparsegpt: ModuleType
    alps: ModuleType
    digests: dict[str, str]

    @classmethod
    def of(cls, sparsegpt: Path, alps: Path) -> Authors:
        """Load `sparsegpt.py` and `alps.py` from two checkouts."""
        files = {"sparsegpt": sparsegpt / "sparsegpt.py", "alps": alps / "alps.py"}
        digests = {name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for name, f in files.items()}
        return cls(*(_module(name, f) for name, f in files.items()), digests)

    def prune_sparsegpt(
        self, weight: Tensor, gram: Tensor, sparsity: float, n: int = 0, m: int = 0
    ) -> Tensor:
        """`fasterprune` with its defaults. `n` of `m`: kept, as everywhere here; theirs counts what goes."""
        solver = self.sparsegpt.SparseGPT(_linear(weight))
        solver.H = gram.clone()
        _quietly(lambda: solver.fasterprune(sparsity, prunen=m - n if m else 0, prunem=m))
        return _weight(solver)

    def prune_alps(self, weight: Tensor, gram: Tensor, sparsity: float, n: int = 0, m: int = 0) -> Tensor:
        """`ALPS_admm` with its defaults."""
        solver = self.alps.ALPS_prune(_linear(weight), 1, 1)
        solver.XtX = gram.clone()
        _quietly(lambda: solver.ALPS_admm(sparsity, nm_n=n, nm_m=m))
        return _weight(solver)


def _module(name: str, file: Path) -> ModuleType:
    module = ModuleType(f"authors_{name}")
    source = file.read_text(encoding="utf-8").replace(_GPU, "cpu")
    with mock.patch.dict(sys.modules, {"quant": ModuleType("quant")}):
        exec(compile(source, str(file), "exec"), module.__dict__)
    return module


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def _weight(solver: Any) -> Tensor:
    weight: Tensor = solver.layer.weight.detach()
    return weight


def _quietly(run: Callable[[], object]) -> None:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        torch.no_grad(),
    ):
        run()
