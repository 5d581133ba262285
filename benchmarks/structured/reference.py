"""Torch-Pruning 1.6.1 as a method: group magnitude, group Taylor and random scores; local and global.

Whatever it cannot find by itself is handed to it: which layers may change, the head counts, the gradients,
and the ratio that reaches the MACs of the target, by bisection.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .task import Target, Task, Unsupported, macs

LIMIT = 600  # seconds for one call
STEPS = 14  # of the search for the ratio
NEAR = 0.002


@dataclass(frozen=True)
class TorchPruning:
    """The variants are criterion x scope x place.

    Places of a ResNet: with residual widths ("all") or without; of a decoder: FFN neurons with query heads or
    without.

    Differs from its defaults: nothing but the choice of layers, the scope and the ratio.
    """

    name: str = "torch-pruning"
    criteria: tuple[str, ...] = ("l2", "taylor")
    scopes: tuple[str, ...] = ("local", "global")
    places: tuple[str, ...] = ("all", "interior")

    def variants(self, task: Task, target: Target) -> tuple[str, ...]:
        places = {"macs": self.places, "width": ("neurons", "neurons and heads")}
        of = places.get(target.kind, ("interior",))
        return tuple(
            f"{c}, {s}, {p}"
            for c in self.criteria
            for s in self.scopes
            for p in of
            # Its local scope rounds heads up layer by layer, a third of them at once with three KV groups.
            if s == "global" or "heads" not in p
        )

    def prune(self, model: nn.Module, task: Task, target: Target, variant: str, seed: int) -> nn.Module:
        """A pruned copy of `model`."""
        if target.kind == "layers":
            raise Unsupported("Torch-Pruning removes no layers")
        criterion, scope, where = variant.split(", ")
        if criterion == "taylor":
            _gradients_(model, task, seed)

        def at(ratio: float) -> nn.Module:
            twin = _copy(model)
            with torch.random.fork_rng(), _limit(LIMIT):
                torch.manual_seed(seed)
                _RUN[target.kind](twin, task, ratio, _importance(criterion), scope == "global", where)
            twin.zero_grad(set_to_none=True)
            return twin

        try:
            by_macs = target.kind in ("macs", "width")
            return _bisect(at, model, task, target) if by_macs else at(target.removed)
        except TimeoutError as error:
            raise Unsupported(f"not finished in {LIMIT} s") from error
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise Unsupported(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from error


def _importance(criterion: str) -> Any:
    import torch_pruning as tp  # type: ignore[import-untyped]

    match criterion:
        case "l2":
            return tp.importance.MagnitudeImportance(p=2)
        case "taylor":
            return tp.importance.TaylorImportance()
        case _:
            return tp.importance.RandomImportance()


def _pruner(model: nn.Module, example: Any, **settings: Any) -> Any:
    import torch_pruning as tp

    # Its default dictionaries are shared between pruners and written to: every call gets its own.
    for name in ("in_channel_groups", "out_channel_groups", "num_heads"):
        settings.setdefault(name, {})
    return tp.pruner.BasePruner(model, example, **settings)


def _convolutions(
    model: nn.Module, task: Task, ratio: float, importance: Any, everywhere: bool, where: str
) -> None:
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if where == "interior":
        ignored += [m for name, m in model.named_modules() if name == "conv1" or name.endswith("conv2")]
    _pruner(
        model,
        task.example(),
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=ignored,
    ).step()


def _heads(model: nn.Module, task: Task, ratio: float, importance: Any, everywhere: bool, where: str) -> None:
    encoder: Any = model.encoder
    attentions = [layer.attention.self for layer in encoder.encoder.layer]
    qkv = [m for a in attentions for m in (a.query, a.key, a.value)]
    ignored = [m for m in encoder.modules() if isinstance(m, nn.Linear | nn.Embedding) and m not in qkv]
    pruner = _pruner(
        encoder,
        _tokens(),
        importance=importance,
        # Heads are looked at only where some width is to be pruned: a ratio of 0 removes no head.
        pruning_ratio=0.01,
        global_pruning=everywhere,
        ignored_layers=ignored,
        num_heads={m: attentions[0].num_attention_heads for m in qkv},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda out: out.last_hidden_state,
    )
    pruner.step()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features


def _neurons(
    model: nn.Module, task: Task, ratio: float, importance: Any, everywhere: bool, where: str
) -> None:
    encoder: Any = model.encoder
    kept = [layer.intermediate.dense for layer in encoder.encoder.layer]
    _pruner(
        encoder,
        _tokens(),
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=[m for m in encoder.modules() if isinstance(m, nn.Linear) and m not in kept],
        output_transform=lambda out: out.last_hidden_state,
    ).step()


def _decoder(
    model: nn.Module, task: Task, ratio: float, importance: Any, everywhere: bool, where: str
) -> None:
    """FFN neurons, and query heads in step over the KV groups, which stay."""
    decoder: Any = model
    config = decoder.config
    attention = config._attn_implementation
    config._attn_implementation = "eager"  # it follows heads through no other form of attention
    counts = {}
    kept = [m for layer in decoder.model.layers for m in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    if "heads" in where:
        for a in (layer.self_attn for layer in decoder.model.layers):
            counts[a.q_proj] = config.num_attention_heads
            counts[a.k_proj] = counts[a.v_proj] = config.num_key_value_heads
    kept += list(counts)
    _pruner(
        decoder,
        torch.randint(0, 1000, (1, 16)),
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=everywhere,
        ignored_layers=[m for m in decoder.modules() if isinstance(m, nn.Linear) and m not in kept],
        num_heads=counts,
        prune_num_heads="heads" in where,
        prune_head_dims=False,
        head_pruning_ratio=ratio if "heads" in where else 0.0,
        output_transform=lambda out: out.logits,
    ).step()
    config._attn_implementation = attention
    for a in (layer.self_attn for layer in decoder.model.layers):
        a.num_key_value_groups = a.q_proj.out_features // a.k_proj.out_features


_RUN: dict[str, Callable[..., None]] = {
    "macs": _convolutions,
    "heads": _heads,
    "ffn": _neurons,
    "width": _decoder,
}


def _tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 2000, (1, 16))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _gradients_(model: nn.Module, task: Task, seed: int) -> None:
    """The gradient of the loss, summed over the calibration batches."""
    model.zero_grad()
    for inputs, target in task.calibration(seed):
        task.loss(model(inputs), target).backward()


def _copy(model: nn.Module) -> nn.Module:
    """A copy with its gradients, which `deepcopy` leaves out."""
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return twin


def _bisect(at: Callable[[float], nn.Module], dense: nn.Module, task: Task, target: Target) -> nn.Module:
    """The model whose MACs are nearest to the target, among those that a search over the ratio visits.

    Steps of interpolation and of bisection in turn; a fifth of a percent off is near enough.
    """
    whole = macs(dense, task)
    wanted = whole * task.remains(target)
    low, high, most, least = 0.0, 1.0, float(whole), 0.0  # ratios and what they leave
    best: tuple[float, nn.Module] | None = None
    for step in range(STEPS):
        ratio = (low + high) / 2 if step % 2 else low + (high - low) * (most - wanted) / (most - least)
        model = at(ratio)
        got = macs(model, task)
        if best is None or abs(got - wanted) < best[0]:
            best = abs(got - wanted), model
        if abs(got - wanted) <= NEAR * wanted:
            break
        if got > wanted:
            low, most = ratio, got
        else:
            high, least = ratio, got
    assert best is not None
    return best[1]


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raises `TimeoutError` after so many seconds; in the main thread only."""

    def expired(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
