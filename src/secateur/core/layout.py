"""Any weight as a matrix `W_OI` (outputs x inputs), and back.

Criteria, patterns and solvers see matrices only. A row holds everything that makes one output; within a
row the input channels of one kernel tap lie side by side, so that N:M groups and blocks run along the
input dimension, as sparse hardware wants them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Layout(Protocol):
    """How one weight is seen as a matrix."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as `[out, in]`; a view where the storage allows it."""

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `matrix` for a weight of `shape`."""

    def run(self, shape: torch.Size) -> int:
        """Inputs that lie side by side in a row before the kernel tap changes."""


@dataclass(frozen=True)
class Plain:
    """`[out, in]` as stored: linear layers, embeddings; vectors are one row, stacks are rows of rows."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, weight.shape[-1]) if weight.dim() > 0 else weight.reshape(1, 1)

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(shape)

    def run(self, shape: torch.Size) -> int:
        return shape[-1] if shape else 1


@dataclass(frozen=True)
class Transposed:
    """`[in, out]` as stored, or a stack of these: `Conv1D` of transformers' GPT-2, experts of its GPT-OSS."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).reshape(-1, weight.shape[-2])

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()

    def run(self, shape: torch.Size) -> int:
        return shape[-2]


@dataclass(frozen=True)
class Convolution:
    """`[out, in / groups, *kernel]` as stored; the matrix is `[out, kernel * in / groups]`."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(1, -1).reshape(weight.shape[0], -1)

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def run(self, shape: torch.Size) -> int:
        return shape[1]


@dataclass(frozen=True)
class TransposedConvolution:
    """`[in, out / groups, *kernel]` as stored; the matrix is `[out, kernel * in / groups]`."""

    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        split = weight.reshape(self.groups, -1, *weight.shape[1:])  # [g, in/g, out/g, *kernel]
        return split.movedim(1, -1).reshape(self.groups * weight.shape[1], -1)

    def restore(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        split = matrix.reshape(self.groups, shape[1], *shape[2:], shape[0] // self.groups)
        return split.movedim(-1, 1).reshape(shape).contiguous()

    def run(self, shape: torch.Size) -> int:
        return shape[0] // self.groups


def layout_of(module: nn.Module, parameter: str) -> Layout:
    """The layout of `module`'s parameter named `parameter`."""
    if parameter == "weight":
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return TransposedConvolution(module.groups)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return Convolution()
        if is_hf_conv1d(module):
            return Transposed()
    # How transformers marks stacks of experts that are stored as inputs x outputs.
    if is_stack(module, parameter) and getattr(module, "is_transposed", False) is True:
        return Transposed()
    return Plain()


def is_stack(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter holds the matrices of several experts, as transformers marks such modules."""
    weight = module._parameters.get(parameter)
    return weight is not None and weight.dim() == 3 and hasattr(module, "is_transposed")


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def matrix_shape(layout: Layout, shape: torch.Size) -> torch.Size:
    """Shape `[out, in]` of the matrix of a weight of `shape`."""
    empty = layout.matrix(torch.empty(shape, device="meta"))
    return torch.Size((empty.shape[0], math.prod(shape) // max(1, empty.shape[0])))
