"""An optimizer without the parameters that left the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import SelectionError


def forget(
    optimizer: torch.optim.Optimizer, alive: Collection[int], gone: Mapping[int, nn.Parameter]
) -> Callable[[], None]:
    """Take the parameters `gone`, by id, and their state out of `optimizer`; returns how to put them back.

    Groups stay, if need be empty, so that schedulers keep theirs.

    Raises `SelectionError` if the optimizer trains neither these nor any that is `alive` in the model.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained and not any(p in trained for p in (*alive, *gone)):
        raise SelectionError(
            "The optimizer trains none of the model's parameters: is it the optimizer of this model?"
        )
    before = [[*group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    state: dict[Tensor, Any] = {p: optimizer.state.pop(p) for p in gone.values() if p in optimizer.state}

    def restore() -> None:
        for group, params in zip(optimizer.param_groups, before, strict=False):
            known = {id(p) for p in params}
            group["params"] = params + [p for p in group["params"] if id(p) not in known]
        optimizer.state.update(state)

    return restore
