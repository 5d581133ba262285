"""Sizes that torch's own modules keep for show: they follow the weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from secateur.core.layout import is_hf_conv1d


def stated_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Attributes of a module and the values that its weights say they have."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = weight.shape
    if isinstance(module, nn.Linear):
        yield from (("out_features", shape[0]), ("in_features", shape[1]))
    elif isinstance(module, nn.Bilinear):
        yield from (("out_features", shape[0]), ("in1_features", shape[1]), ("in2_features", shape[2]))
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from (("num_embeddings", shape[0]), ("embedding_dim", shape[1]))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", shape[0]
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", shape[0]
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        yield from (("in_channels", shape[0]), ("out_channels", shape[1] * module.groups))
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield from (("out_channels", shape[0]), ("in_channels", shape[1] * module.groups))
    elif is_hf_conv1d(module):
        yield from (("nx", shape[0]), ("nf", shape[1]))
