"""Adapters held: LoRA layers that compute with masked products, as the merged model will.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.names import unwrap
from secateur.lora.adapters import LoraError, Masked, apply_, masked_weights
from secateur.masks import Masks


def hold_lora(model: nn.Module, masks: Masks) -> LoraHold:
    r"""Let the LoRA layers of a `peft` model compute with masked products until released.

    $$ y = x W^T + s\,\mathrm{dropout}(x)\,(M \odot B A)^T $$

    Gradients reach the adapters through kept weights alone, and `merge_lora_` then loses nothing. For DoRA
    the norms are those of masked rows. Use as a context manager around training and merging, or call
    `release()`. The masks are applied to the base weights at once. State-dict keys, saving and the optimizer
    are untouched. Adapters that are added later are not held.

    Cost: each pass forms $B A$ and multiplies by it, as much as the layer itself does, and keeps two matrices
    of the weight's shape for the backward pass; checkpointing of activations saves that memory.

    Args:
        model: a `PeftModel`. Masked weights with adapters are those of linear layers or of transformers'
            `Conv1D`.
        masks: of the base model, under its own names.

    Raises:
        LoraError: no adapter lies on a masked weight, or one cannot be merged, as in `merge_lora_`.
        MaskError: masks that do not fit.

    References: Muñoz et al. 2024, SQFT (SparsePEFT); Lu et al. 2024, SPP; Hu et al. 2025, LoRS. Differs from
    LoRS: the product is kept for the backward pass instead of being formed again.
    """
    return LoraHold(unwrap(model), masks)


class LoraHold:
    """Adapters held under masks; see `hold_lora`."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        weights = masked_weights(model, masks)
        if all(w.layer is None for w in weights):
            raise LoraError("No LoRA adapter lies on a masked weight: are these the masks of this model?")
        apply_(weights)
        self._held = ExitStack()
        self._held.enter_context(masked_deltas(weights))
        for w in weights:
            for adapter in w.layer.lora_A if w.layer is not None else ():
                for handle in _Product(w.layer, adapter, w.keep).attach():
                    self._held.callback(handle.remove)

    def release(self) -> None:
        """Stop holding; adapters and weights stay as they are."""
        self._held.close()

    def __enter__(self) -> LoraHold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def masked_deltas(weights: Sequence[Masked]) -> Iterator[None]:
    """Inside, peft merges and unmerges masked products."""
    layers = [(w.layer, w.keep) for w in weights if w.layer is not None]
    before = [vars(layer).get("get_delta_weight") for layer, _ in layers]
    for layer, keep in layers:
        layer.get_delta_weight = _Delta(layer, keep)
    try:
        yield
    finally:
        for (layer, _), delta in zip(layers, before, strict=True):
            del layer.get_delta_weight
            if delta is not None:  # a hold around this one
                layer.get_delta_weight = delta


# Objects rather than closures: in a copy of a held model they become those of the copy.


class _Delta:
    """`get_delta_weight` of one layer, masked."""

    def __init__(self, layer: Any, keep: Tensor) -> None:
        self._layer, self._gone = layer, ~keep

    def __call__(self, adapter: str) -> Tensor:
        delta: Tensor = type(self._layer).get_delta_weight(self._layer, adapter)
        return delta.masked_fill(self._gone.to(delta.device), 0)


class _Product:
    """`lora_B(lora_A(x))` of one adapter of one layer, with the product masked.

    peft calls the two one after the other wherever it computes with an adapter, so that dropout, casts, the
    norms of DoRA and batches for several adapters remain its own code.
    """

    def __init__(self, layer: Any, adapter: str, keep: Tensor) -> None:
        self._A, self._B = layer.lora_A[adapter], layer.lora_B[adapter]
        self._gone_OI = ~(keep.T if layer.fan_in_fan_out else keep)
        self._x: Tensor | None = None

    def attach(self) -> tuple[RemovableHandle, RemovableHandle]:
        return self._A.register_forward_hook(self._hear), self._B.register_forward_hook(self._answer)

    def _hear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._x = args[0]

    def _answer(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None
        product_OI = self._B.weight @ self._A.weight
        self._gone_OI = self._gone_OI.to(product_OI.device)
        return F.linear(x, product_OI.masked_fill(self._gone_OI, 0), self._B.bias)
