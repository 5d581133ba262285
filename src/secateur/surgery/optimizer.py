"""Optimizers follow their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.surgery.journal import Journal

Cut = Callable[[Tensor], Tensor]


def migrate(
    optimizer: Optimizer, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Cut]], journal: Journal
) -> None:
    """Replace parameters in an optimizer, cutting momenta and other state of their shape alike.

    Args:
        optimizer: any; state tensors of another shape than the parameter's (step counts) stay.
        replaced: new parameter, and how a tensor of the old shape is cut, by old parameter.
        journal: where to remember what was there.
    """
    for group in optimizer.param_groups:
        params = group["params"]
        for i, p in enumerate(params):
            if p in replaced:
                journal.set_item(params, i, replaced[p][0])
    state = optimizer.state
    for old, (new, cut) in replaced.items():
        if old not in state:
            continue
        entry = state[old]

        def put_back(old: nn.Parameter = old, new: nn.Parameter = new, entry: object = entry) -> None:
            state.pop(new, None)
            state[old] = entry

        journal.done(put_back)
        state[new] = {
            key: cut(value.detach()) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in entry.items()
        }
        del state[old]
