"""`nn.MultiheadAttention` with sizes that are read from its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.errors import SecateurError

# Legend of the suffixes: N batch, L queries, S keys, H heads, D head size, R = H * D rows of a projection.


class SlimMultiheadAttention(nn.MultiheadAttention):
    r"""`nn.MultiheadAttention` whose projections may have been sliced.

    The same parameters under the same names, the same arguments of `forward` and the same results; only the
    sizes come from the weights, where torch asks for those that the module was built with. Made by `swap_`,
    never by its constructor.

    With $r_v$ columns of `out_proj.weight`, the rows of the projections of queries, keys and values are

    $$ r_q = r_k = (\text{rows of in\_proj\_weight} - r_v) / 2, \qquad r_v $$

    so the heads of the values may have another size than those of queries and keys. `in_proj_weight` holds
    the three parts one after the other. `num_heads` is the one attribute that has to be set when heads are
    removed; nothing here reads `embed_dim`, `head_dim`, `kdim` and `vdim`.

    The scores are multiplied with `scale`, a number that stays what it was at the swap when dimensions of
    heads are removed: the dimensions that stay shall have the scores that they had.

    Differs from torch: it never takes torch's fused kernels for inference, it calls `out_proj` as a module,
    so that hooks see its input, and it returns contiguous results for `batch_first=True` too.

    Attributes:
        scale: $1 / \sqrt{D}$ of the module before it was sliced.
    """

    scale: float

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer asks for it before it calls its fused kernel with the integers of the
        # unpruned module. A property comes before the module's own attribute, which stays for the undo.
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise SecateurError(
                "Pruned attention does not support nested tensors: pad the input and give key_padding_mask."
            )
        if is_causal and attn_mask is None:
            raise SecateurError("is_causal says what attn_mask is, and attn_mask is missing: give it too.")
        is_batched = query.dim() == 3
        batch = 0 if self.batch_first else 1
        if not is_batched:
            query, key, value = (x.unsqueeze(batch) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

        q_NHLD, k_NHSD, v_NHSD = self._heads(*self._projected(query, key, value))
        # torch leaves the mask to the kernel under just these conditions; with others it needs the mask.
        is_hint_enough = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_hint_enough else self._mask(q_NHLD, k_NHSD, attn_mask, key_padding_mask)

        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q_NHLD * self.scale) @ k_NHSD.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            out_NHLD = weights @ v_NHSD
        else:
            weights = None
            out_NHLD = F.scaled_dot_product_attention(
                q_NHLD, k_NHSD, v_NHSD, mask, dropout, is_hint_enough, scale=self.scale
            )
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        out: Tensor = self.out_proj(out_NHLD.permute(order).flatten(2))

        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            out, weights = out.squeeze(batch), None if weights is None else weights.squeeze(0)
        return out, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, [.., .., R], with the learned extra key and value."""
        packed = self.in_proj_weight
        if packed is not None:
            of_values = self.out_proj.weight.shape[1]
            rows = [(packed.shape[0] - of_values) // 2, (packed.shape[0] - of_values) // 2, of_values]
        else:
            rows = [w.shape[0] for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)]
        if packed is not None and query is key and key is value:  # one product instead of three
            q, k, v = F.linear(query, packed, self.in_proj_bias).split(rows, dim=-1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if packed is None else packed.split(rows)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(rows)
            inputs = (query, key, value)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:  # [1, 1, R], a last position
            along = 1 if self.batch_first else 0
            size = [1, 1, -1]
            size[1 - along] = q.shape[1 - along]
            k, v = (torch.cat((x, b.expand(size)), along) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        return q, k, v

    def _heads(self, *projections: Tensor) -> tuple[Tensor, ...]:
        """Projections as [N, H, .., D], with the extra key and value of zeros."""
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        # Not a view with -1: that has no answer for a batch without examples.
        found = [x.unflatten(-1, (self.num_heads, -1)).permute(order) for x in projections]
        if self.add_zero_attn:
            found[1:] = [F.pad(x, (0, 0, 0, 1)) for x in found[1:]]
        return tuple(found)

    def _mask(
        self, q_NHLD: Tensor, k_NHSD: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores, so that it broadcasts to [N, H, L, S]; None for nothing."""
        (n, heads, length, _), positions = q_NHLD.shape, k_NHSD.shape[2]
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)  # positions no mask knows of
        found: Tensor | None = None
        if attn_mask is not None:
            allowed = [(length, positions - extra), (n * heads, length, positions - extra)]
            if tuple(attn_mask.shape) not in allowed:
                raise SecateurError(
                    f"attn_mask has the shape {tuple(attn_mask.shape)}, but {allowed[0]} or {allowed[1]} is "
                    f"needed for {n} sequences and {heads} heads."
                )
            found = _added(attn_mask, q_NHLD.dtype)
            found = found if found.dim() == 2 else found.unflatten(0, (n, heads))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (n, positions - extra):
                raise SecateurError(
                    f"key_padding_mask has the shape {tuple(key_padding_mask.shape)}, but "
                    f"{(n, positions - extra)} is needed."
                )
            padding = _added(key_padding_mask, q_NHLD.dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found if found is None or not extra else F.pad(found, (0, extra))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to scores: minus infinity where a boolean one is True."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise SecateurError(f"A mask of {mask.dtype} is neither boolean nor floating-point: convert it.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


@dataclass
class Swapped:
    """What `swap_` did.

    Attributes:
        attention: modules that were `nn.MultiheadAttention`.
        encoders: encoders that would have made nested tensors.
    """

    attention: tuple[Any, ...] = field(repr=False)
    encoders: tuple[nn.TransformerEncoder, ...] = field(repr=False)

    def undo(self) -> None:
        """Give the modules their class back. Their weights must have the sizes they had at the swap."""
        for module in self.attention:
            if type(module) is SlimMultiheadAttention:
                module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
                del module.scale
        for encoder in self.encoders:
            encoder.use_nested_tensor = True


def swap_(model: nn.Module) -> Swapped:
    """Let every `nn.MultiheadAttention` in `model` take its sizes from its weights.

    Subclasses stay what they are: their forward is their own. Parameters, names and results do not change,
    with one exception: an `nn.TransformerEncoder` does without nested tensors, so that in evaluation its
    outputs at padded positions are what they are in training, and not zeros.
    """
    attention: list[Any] = [m for m in model.modules() if type(m) is nn.MultiheadAttention]
    encoders = []
    for module in attention:
        module.scale = float(module.head_dim) ** -0.5
        module.__class__ = SlimMultiheadAttention
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _has_slim(module):
            module.use_nested_tensor = False
            encoders.append(module)
    return Swapped(tuple(attention), tuple(encoders))


def _has_slim(model: nn.Module) -> bool:
    return any(isinstance(module, SlimMultiheadAttention) for module in model.modules())
