"""Dense against sparse: whole models, called in turn, and single layers before anyone prunes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from secateur.core.errors import SecateurError
from secateur.core.modes import evaluation
from secateur.core.names import unwrap
from secateur.measure import as_call
from secateur.printing import printed
from secateur.progress import track
from secateur.runtime import native
from secateur.runtime.choose import Choice, choose, formats
from secateur.runtime.linear import SparseLinear


@dataclass(frozen=True)
class Spread:
    """Seconds: median and quartiles of `runs` measurements."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        # "inclusive": quartiles within what was measured, of two runs too.
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class Row:
    """One thing that both models did; `tokens` a second are counted by, if it was text."""

    what: str
    tokens: int | None
    dense: Spread
    sparse: Spread

    @property
    def speedup(self) -> float:
        """How many times faster the sparse model is, by medians."""
        return self.dense.median / self.sparse.median


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured."""

    rows: tuple[Row, ...]
    dense_bytes: int
    sparse_bytes: int
    kernels: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=f"Dense against sparse: kernels {self.kernels}, {self.threads} threads")
        for heading in ("", "dense", "sparse", "times faster"):
            table.add_column(heading)
        for row in self.rows:
            table.add_row(row.what, _shown(row, row.dense), _shown(row, row.sparse), f"{row.speedup:.2f}")
        table.add_row(
            "weights and buffers", *(f"{b / 1e6:.1f} MB" for b in (self.dense_bytes, self.sparse_bytes)), ""
        )
        return printed(table, 118)


def bench(dense: nn.Module, sparse: nn.Module, example: Any, *, runs: int = 10) -> BenchReport:
    """Time a forward pass of both models on the same input, in turn.

    Args:
        dense: the model as it was.
        sparse: what `compress` made of it.
        example: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        runs: timed passes of each, after one that is not counted.

    Raises:
        SecateurError: `runs` below 1.
    """
    args, kwargs = as_call(example)
    models = _pair(dense, sparse, runs)

    def forward(model: nn.Module) -> Iterator[float]:
        yield _seconds(lambda: model(*args, **kwargs))

    seconds = _in_turn(models, forward, runs)
    row = Row("forward pass", None, *(Spread.of(s) for s in seconds))
    return _report((row,), models)


def bench_text(
    dense: nn.Module, sparse: nn.Module, *, prompt: int = 64, new: int = 32, runs: int = 5
) -> BenchReport:
    """Time reading a prompt and writing tokens after it, one by one with a cache, in turn.

    Args:
        dense: a language model of transformers.
        sparse: what `compress` made of it.
        prompt: tokens of the prompt, which are random.
        new: tokens written; each is timed.
        runs: prompts.

    Raises:
        SecateurError: numbers below 1, or a model that writes no text.
    """
    models = _pair(dense, sparse, runs)
    if prompt < 1 or new < 1:
        raise SecateurError(f"prompt=... and new=... are at least 1; got {prompt} and {new}.")
    config: Any = getattr(dense, "config", None)
    if config is None or not getattr(dense, "can_generate", lambda: False)():
        raise SecateurError(f"{type(dense).__name__} writes no text: use bench(dense, sparse, example).")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, (1, prompt), generator=generator)

    def write(model: nn.Module) -> Iterator[float]:
        state: dict[str, Any] = {}

        def step(tokens: Tensor) -> None:
            out = model(input_ids=tokens, past_key_values=state.get("cache"), use_cache=True)
            state.update(cache=out.past_key_values, next=out.logits[:, -1:].argmax(-1))

        yield _seconds(lambda: step(ids))
        for _ in range(new):
            yield _seconds(lambda: step(state["next"]))

    seconds = _in_turn(models, write, runs)
    parts: list[tuple[list[float], list[float]]] = []
    for taken in seconds:
        chunks = [taken[i : i + new + 1] for i in range(0, len(taken), new + 1)]
        parts.append(([c[0] for c in chunks], [s for c in chunks for s in c[1:]]))
    rows = (
        Row(f"prompt of {prompt} tokens", prompt, *(Spread.of(p[0]) for p in parts)),
        Row("each token after it", 1, *(Spread.of(p[1]) for p in parts)),
    )
    return _report(rows, models)


def advise(
    rows: int,
    columns: int,
    sparsity: float,
    *,
    tokens: Sequence[int] = (1, 64),
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    plan: bool = True,
) -> Choice | None:
    """Would a linear layer of this shape be faster here? Measured on random weights, before anyone prunes.

    Args:
        rows: outputs of the layer.
        columns: inputs.
        sparsity: fraction of zeros, spread at random.
        tokens: how many come at once.
        dtype: of the dense layer and its input.
        stored: of the packed values: bfloat16 or int8 for less memory. None: `dtype`.
        plan: whether the layout for many tokens may be kept.

    Returns:
        The best format with its measured times; None without compiled kernels.

    Raises:
        SecateurError: bad settings.
    """
    if rows < 1 or columns < 1 or not 0 <= sparsity <= 1:
        raise SecateurError(f"{rows} x {columns} with a sparsity of {sparsity} is no layer.")
    if not tokens or any(n < 1 for n in tokens):
        raise SecateurError(f"tokens=... are whole numbers from 1 on; got {list(tokens)}.")
    if native.library() is None:
        return None
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(0, columns**-0.5, generator=generator)
        layer.weight *= torch.rand(rows, columns, generator=generator) >= sparsity
    weight, kind = layer.weight.detach(), stored or dtype
    tried = formats(weight, kind)
    return choose(layer, weight, None, None, dtype=kind, tokens=tuple(tokens), plan=plan, tried=tried)


def _pair(dense: nn.Module, sparse: nn.Module, runs: int) -> tuple[nn.Module, nn.Module]:
    if runs < 1:
        raise SecateurError(f"runs=... is at least 1; got {runs}.")
    return unwrap(dense), unwrap(sparse)


def _in_turn(
    models: tuple[nn.Module, nn.Module], work: Callable[[nn.Module], Iterator[float]], runs: int
) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode(), evaluation(models[0]), evaluation(models[1]):
        for model in models:
            for _ in work(model):  # pages, caches of pointers, oneDNN's primitives
                pass
        for _ in track(range(runs), "timing", runs):
            for model, into in zip(models, seconds, strict=True):
                into.extend(work(model))
    return seconds


def _report(rows: tuple[Row, ...], models: tuple[nn.Module, nn.Module]) -> BenchReport:
    return BenchReport(rows, _bytes(models[0]), _bytes(models[1]), native.kernels(), torch.get_num_threads())


def _bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, SparseLinear) and module.plan is not None:
            tensors |= {t.data_ptr(): t.numel() * t.element_size() for t in module.plan.buffers()}
    return sum(tensors.values())


def _shown(row: Row, time: Spread) -> str:
    spread = f"{1e3 * time.median:.1f} ms ({1e3 * time.low:.1f} to {1e3 * time.high:.1f})"
    return spread if row.tokens is None else f"{row.tokens / time.median:.1f} tokens/s, {spread}"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
