"""Definitions written out the long way, against which the measured statistics are held.

Nothing here uses the package: gradients come from `loss.backward()` on one example at a time, matrices from
plain permutations, Hessians from `torch.autograd.functional.hessian`.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Any, Any], Tensor]
Examples = list[tuple[Any, Any]]  # (arguments, target), each tensor with a first dimension of 1


def examples(inputs: Tensor, target: Tensor) -> Examples:
    return [((inputs[i : i + 1],), target[i : i + 1]) for i in range(len(inputs))]


def matrix(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight, or its gradient, as [out, in]: taps then channels for convolutions."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return tensor.permute(0, *range(2, tensor.dim()), 1).flatten(1) if tensor.dim() > 1 else tensor[None]
    if tensor.dim() != 2:
        return tensor.reshape(1, -1)
    return tensor.t() if type(module).__name__ == "Conv1D" else tensor


def example_gradients(
    model: nn.Module, examples: Examples, loss: Loss, names: Iterable[str]
) -> dict[str, Tensor]:
    """Gradients [examples, out, in] of each example's own loss, in evaluation mode."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for args, target in examples:
        model.zero_grad(set_to_none=True)
        loss(model(*args), target).backward()
        for name, grads in found.items():
            p = parameters[name]
            grads.append(matrix(model, name, torch.zeros_like(p) if p.grad is None else p.grad))
    return {name: torch.stack(grads) for name, grads in found.items()}


def weight(model: nn.Module, name: str) -> Tensor:
    return matrix(model, name, model.get_parameter(name).detach())


def hessian(model: nn.Module, names: list[str], value: Callable[[nn.Module], Tensor]) -> Tensor:
    """Hessian of `value(model)` for all entries of the named parameters, flattened as stored."""
    parameters = [model.get_parameter(name).detach() for name in names]

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters])
        tensors = {n: part.view_as(p) for n, part, p in zip(names, parts, parameters, strict=True)}
        return value(lambda *args: functional_call(model, tensors, args))

    flat = torch.cat([p.flatten() for p in parameters])
    return torch.autograd.functional.hessian(of, flat)


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> bool:
    """Whether two tensors differ by little beside their norm, which must not be zero."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert expected.norm() > 0
    return bool((actual - expected).norm() <= rtol * expected.norm())


def next_token(output: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # inside the tiny vocabulary


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **_ENDS))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return BertForMaskedLM(
        BertConfig(vocab_size=50, num_hidden_layers=2, max_position_embeddings=16, **sizes)
    )


class Twice(nn.Module):
    """One module called twice, on a sequence and on its reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.first(x).tanh()).tanh()
        return self.head(self.shared(h.flip(1)).mean(1))


class Tied(nn.Module):
    """Two linear modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Borrowed(nn.Module):
    """A weight used by its own module, and once more by a bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.first(x).tanh(), self.first.weight).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TimeFirst(nn.Module):
    """Swaps batch and time before its layers, as recurrent code often does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.transpose(0, 1)).tanh()).mean(0))


class Flattened(TimeFirst):
    """Flattens batch and time into one dimension before its layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x.flatten(0, 1)).tanh())
        return self.head(h.unflatten(0, x.shape[:2]).mean(1))


class BatchStatistics(TimeFirst):
    """Subtracts a fraction of the batch's mean: examples influence each other in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh().mean(1)
        return self.head(self.second(h - 0.5 * h.mean(0, keepdim=True)))


class Experts(nn.Module):
    """Routes each token to one of two experts, which see as many rows as tokens chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 2)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        share, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero().view(-1)
            out = out.index_add(0, mine, expert(tokens[mine]) * share[mine, None])
        return self.head(out.view_as(x).mean(1))
