"""Modules of torch that check sizes which they keep, exchanged for ones that read them from their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from secateur.swaps import SlimMultiheadAttention, swap_


@dataclass(frozen=True)
class Exchanged:
    """Which modules were exchanged, and how to change them back."""

    names: tuple[str, ...]
    undo: Callable[[], object]


def swap_modules_(model: nn.Module) -> Exchanged:
    """Exchange the classes of all such modules that are not exchanged yet."""
    touched = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention | nn.TransformerEncoder)]
    if not touched:
        return Exchanged((), lambda: None)
    saved = [(m, type(m), dict(vars(m))) for m in touched]
    try:
        before = {name for name, m in model.named_modules() if isinstance(m, SlimMultiheadAttention)}
        handle = swap_(model)
        after = {name for name, m in model.named_modules() if isinstance(m, SlimMultiheadAttention)}
        return Exchanged(tuple(sorted(after - before)), handle.undo)
    except BaseException:
        for module, kind, own in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(own)
        raise
