"""Adapters merged into the weights that are kept, and how much of them that loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur.core.errors import NonFiniteError
from secateur.core.names import unwrap
from secateur.lora.adapters import LoraError, Masked, active, apply_, lora_layers, masked_weights
from secateur.lora.hold import masked_deltas
from secateur.masks import Masks


@dataclass(frozen=True, eq=False)
class Merged:
    """A model with its adapters merged, and what the masks took away from them.

    Attributes:
        model: the plain base model.
        power: squared Frobenius norm of what the adapters add to each masked weight, by parameter name.
        gone: the part of it that fell on pruned weights and is lost.
    """

    model: nn.Module = field(repr=False)
    power: Mapping[str, float]
    gone: Mapping[str, float]

    @property
    def lost(self) -> float:
        """Share of the adapters' power that is lost, over all masked weights; 0 while they were held."""
        return _share(sum(self.gone.values()), sum(self.power.values()))

    def by_layer(self) -> dict[str, float]:
        """Share of the adapters' power that is lost, for each masked weight that has an adapter."""
        return {name: _share(self.gone[name], power) for name, power in self.power.items()}

    def __str__(self) -> str:
        merged = f"Adapters of {len(self.power)} masked weights merged"
        if not self.lost:
            return f"{merged}; nothing of them lay on pruned weights."
        name, share = max(self.by_layer().items(), key=lambda item: item[1])
        return (
            f"{merged}; {self.lost:.1%} of their power lay on pruned weights and is lost, up to "
            f"{share:.1%} in {name}. This is not the model that was trained: under hold_lora nothing is lost."
        )


def merge_lora_(model: nn.Module, masks: Masks) -> Merged:
    r"""Merge the active LoRA adapters of a `peft` model into its base weights, under the masks.

    $$ W \leftarrow W + M \odot s B A $$

    with the scaling $s$ of the adapter; for DoRA the rows of this sum are then given the norms that were
    trained. Weights that no mask covers are merged whole. peft does the work, and like its
    `merge_and_unload` this uses up the model that is passed.

    Call it while `hold_lora` holds. Otherwise the model that was trained is not the one that is merged, and
    the result says how much of the adapters is lost.

    Args:
        model: a `PeftModel`. Masked weights with adapters are those of linear layers or of transformers'
            `Conv1D`.
        masks: of the base model, under its own names.

    Returns:
        The plain base model, and what was lost.

    Raises:
        LoraError: no active adapter, or one that cannot be merged under a mask: on another kind of layer or a
            quantised one, of another variant than DoRA, merged already, or DoRA on a row that has no weight
            left.
        MaskError: masks that do not fit. NonFiniteError: adapters that hold NaN or infinity.
            On all of these nothing has been changed.

    References: Hu et al. 2022, LoRA, section 4.1; Muñoz et al. 2024, SQFT, for the mask on the product.
    """
    model = unwrap(model)
    weights = masked_weights(model, masks)
    if not any(active(layer) for layer in lora_layers(model)[1].values()):
        raise LoraError("The model has no active LoRA adapter: load one, or activate one with set_adapter.")
    powers = {w.name: _powers(w) for w in weights if w.layer is not None and active(w.layer)}
    apply_(weights)
    with masked_deltas(weights):
        try:
            merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise LoraError(f"peft cannot merge the adapters: {error}") from error
    masks.check(merged)
    return Merged(merged, {n: p for n, (p, _) in powers.items()}, {n: g for n, (_, g) in powers.items()})


@torch.no_grad()
def _powers(weight: Masked) -> tuple[float, float]:
    """Squared norm of what the adapters add to a weight, and of the part that its mask removes."""
    assert weight.layer is not None
    deltas = (weight.layer.get_delta_weight(adapter).float() for adapter in active(weight.layer))
    squares = torch.stack(list(deltas)).sum(0).square()
    whole = float(squares.sum(dtype=torch.float64))
    if not math.isfinite(whole):
        raise NonFiniteError(f"The adapters of {weight.name} hold NaN or infinity: look at their training.")
    gone = squares.masked_fill_(weight.keep.to(squares.device), 0)
    return whole, float(gone.sum(dtype=torch.float64))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
