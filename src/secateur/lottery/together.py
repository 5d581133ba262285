"""Several networks of one architecture as one batched model: a step of all of them is one step of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from secateur.core.errors import ScheduleError, SecateurError
from secateur.lottery.trial import State, Trial, load_optimizer, optimizer_tensors, replay
from secateur.masks import Masks

_DROPOUT = nn.modules.dropout._DropoutNd


def batchable(model: nn.Module) -> bool:
    """Whether a forward pass changes nothing and draws nothing, and no parameter is tied or frozen.

    Buffers differ between networks, by what training or initialisation put there.
    """
    modules = list(model.modules())
    if any(isinstance(m, nn.RReLU) or (isinstance(m, _DROPOUT) and m.p > 0) for m in modules):
        return False
    if next(model.buffers(), None) is not None:
        return False
    parameters = list(model.named_parameters(remove_duplicate=False))
    if len({id(p) for _, p in parameters}) < len(parameters):
        return False
    return all(p.requires_grad for _, p in parameters)


class Together:
    """The networks of several trials, stacked, with one optimizer and their masks.

    An optimizer that treats every entry of a parameter by itself does to a stack what it does to each.

    Raises `SecateurError` if the networks differ in architecture or in where they start.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        total: int,
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        make_scheduler: Callable[[torch.optim.Optimizer], Any],
    ) -> None:
        self.trials = list(trials)
        first = self.trials[0]
        shapes = [{n: p.shape for n, p in t.model.named_parameters()} for t in self.trials]
        if any(s != shapes[0] for s in shapes) or len({_start(t) for t in self.trials}) > 1:
            raise SecateurError(
                "Networks that are trained together have one architecture and start at one step."
            )
        self.total, self.start = total, first.start
        if self.start >= total:
            raise ScheduleError(
                f"Training of {total} steps cannot start at step {self.start}: rewind to one before its end."
            )
        self._names = list(shapes[0])
        parameters = [dict(t.model.named_parameters()) for t in self.trials]
        self._stacked = {
            n: torch.stack([p[n].detach() for p in parameters]).requires_grad_() for n in self._names
        }
        self._keep = {n: k for n in self._names if (k := _keep(n, self.trials)) is not None}
        self._model = first.model
        self._graph: Callable[..., Tensor] | None = None
        self._shape = torch.Size()
        self.optimizer = make_optimizer(list(self._stacked.values()))
        self.scheduler = make_scheduler(self.optimizer)
        self._last_rate = first.last_rate
        states = [t.state for t in self.trials]
        if first.state is not None and first.state.optimizer:
            load_optimizer(self.optimizer, _stack([s.optimizer for s in states if s is not None]))
        if self.scheduler is not None:
            replay(self.scheduler, total - 1 if self._last_rate else self.start)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs `[networks, examples, ...]` for inputs `[networks, examples, ...]`."""
        if self._graph is None or self._shape != x.shape:
            self._graph, self._shape = batched(self._model, self._stacked, x), x.shape
        outputs: Tensor = self._graph(self._stacked, x)
        return outputs

    def steps(self) -> Iterator[int]:
        """Numbers of the steps; afterwards each trial's network is trained."""
        last = self.total if self.trials[0].stop is None else min(self.total, self.trials[0].stop)
        for trial in self.trials:
            trial.model.train()
        self._mask()
        for step in range(self.start, last):
            for trial in self.trials:
                trial.step = step
            yield step
            self._mask()
            if self.scheduler is not None and not self._last_rate:
                replay(self.scheduler, 1)
        self.show()
        tensors = optimizer_tensors(self.optimizer)
        for i, trial in enumerate(self.trials):
            trial.step = last
            model = {n: t.detach().clone() for n, t in trial.model.state_dict().items()}
            own = {n: (t[i].clone() if t.dim() else t.clone()) for n, t in tensors.items()}
            # Nothing was drawn: each has the random state that it began with.
            trial.end = State(last, model, own, trial.random, list(trial.log_))

    @torch.no_grad()
    def show(self) -> None:
        """Put the weights into the networks."""
        self._mask()
        for i, trial in enumerate(self.trials):
            for name, parameter in trial.model.named_parameters():
                parameter.copy_(self._stacked[name][i])

    @torch.no_grad()
    def _mask(self) -> None:
        for name, keep in self._keep.items():
            self._stacked[name].mul_(keep)  # ten times as fast as masked_fill_


def _start(trial: Trial) -> tuple[int, bool, int | None, bool]:
    return trial.start, trial.last_rate, trial.stop, trial.state is None or not trial.state.optimizer


def _keep(name: str, trials: Sequence[Trial]) -> Tensor | None:
    """Ones and zeros of all networks; None where all masks leave the parameter whole."""
    masks: list[Masks] = [t.masks for t in trials]
    if not any(name in m and not bool(m[name].all()) for m in masks):
        return None
    weights = [dict(t.model.named_parameters())[name] for t in trials]
    parts = [m[name].to(w) if name in m else torch.ones_like(w) for m, w in zip(masks, weights, strict=True)]
    return torch.stack(parts).detach()


def _stack(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of each network's optimizer, one on the other; numbers of steps are the same in all."""
    return {n: torch.stack([s[n] for s in states]) if t.dim() else t for n, t in states[0].items()}


def batched(model: nn.Module, stacked: dict[str, Tensor], x: Tensor) -> Callable[..., Tensor]:
    """`f(stacked, x)`, the forward pass of all networks, as one graph of torch's operations.

    The batching is done once: repeated in each step, its Python takes as long as a small network.
    """

    def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, (x,))
        return output

    def all_(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with _OwnLinear():
            outputs: Tensor = torch.func.vmap(one)(parameters, x)
        return outputs

    try:
        with torch.no_grad():
            graph = make_fx(all_)(stacked, x)
    except RuntimeError as error:  # random numbers in its forward pass, say, which would be the same for all
        raise SecateurError(
            f"These networks cannot be trained together ({str(error).splitlines()[0]}): pass small=False."
        ) from error
    for node in graph.graph.nodes:
        if node.target is _stacked_linear().default:
            node.target = _stacked
    graph.recompile()
    return graph


class _OwnLinear(TorchFunctionMode):
    """Linear layers whose stacked weights have gradients in their own layout.

    The batching rule of torch makes them transposed, and copies them: half of the time of a small network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer that knows how it is batched; it is only traced, never run."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight.T if bias is None else x @ weight.T + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Backward is that of `_Stacked`."""

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, int]:
        def stacked(t: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return t.expand(info.batch_size, *t.shape)
            return t.movedim(dim, 0) if dim else t

        x, weight = stacked(x, dims[0]), stacked(weight, dims[1])
        rows = x if x.dim() == 3 else x.flatten(1, -2) if x.dim() > 3 else x[:, None]
        out = _stacked_linear()(rows, weight, None if bias is None else stacked(bias, dims[2]))
        return out.view(*x.shape[:-1], weight.shape[1]), 0


@cache
def _stacked_linear() -> Any:
    """An operation that stands for `_Stacked` in a graph."""
    schema = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"

    @torch.library.custom_op("secateur::stacked_linear", mutates_args=(), schema=schema)
    def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    return torch.ops.secateur.stacked_linear


def _stacked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Stacked.apply(x, weight, bias)


class _Stacked(torch.autograd.Function):
    """`x[n] @ weight[n].T + bias[n]` for `[networks, rows, in]`, `[networks, out, in]`, `[networks, out]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return to_x, torch.bmm(grad.transpose(1, 2), x), grad.sum(1) if ctx.has_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
