"""Distillation: the pruned model learns from the dense one, in any loop."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.errors import SecateurError, SelectionError
from secateur.core.modes import evaluation
from secateur.core.names import unwrap


class Distill:
    r"""A loss that pulls a student's outputs, and hidden states, to those of a teacher.

        with sc.Distill(model, teacher) as distill:
            for x, y in loader:
                output = model(x)
                loss = distill(F.cross_entropy(output, y), output)
                ...

    .. math:: (1 - \alpha) L + \alpha T^2\, \mathrm{KL}(\mathrm{softmax}(t/T) \,\|\, \mathrm{softmax}(s/T))
              + \eta \sum_{i \to j} \frac{\lVert h^s_i - h^t_j \rVert^2}{\lVert h^t_j \rVert^2}

    with logits s and t, the task's loss L and the hidden states of mapped layers. The teacher gets the
    arguments of the student's last call, in evaluation mode and without gradients. The student is left as it
    is but for hooks, which go with the `with` block.

    Args:
        student: the model in training; wrappers of compilation and data parallelism are looked through.
        teacher: a model that takes the same arguments and gives logits of the same shape.
        weight: :math:`\alpha`, between 0 and 1.
        temperature: T, above 0.
        hidden: module of the student -> module of the teacher, by names; their outputs have the same shape.
            An output that is a tuple counts with its first tensor.
        hidden_weight: :math:`\eta`.

    Raises:
        SelectionError: a module of `hidden` does not exist.
        SecateurError: settings out of range; when called, no call to learn from or unlike outputs.

    Reference: Hinton et al. 2015, Distilling the knowledge in a neural network; Romero et al. 2015 for hidden
    states. Differs from the latter: relative errors, so that layers of unlike scale count alike.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 0.5,
        temperature: float = 2.0,
        hidden: Mapping[str, str] | None = None,
        hidden_weight: float = 1.0,
    ) -> None:
        if not (0 <= weight <= 1 and temperature > 0 and hidden_weight >= 0):
            raise SecateurError(
                "Distill takes a weight in [0, 1], a temperature above 0 and a hidden_weight of at least 0; "
                f"got {weight}, {temperature}, {hidden_weight}."
            )
        self.student, self.teacher = unwrap(student), unwrap(teacher)
        self.weight, self.temperature, self.hidden_weight = weight, temperature, hidden_weight
        self.hidden = dict(hidden or {})
        self._pairs = [
            (_module(self.student, s, "student"), _module(self.teacher, t, "teacher"))
            for s, t in self.hidden.items()
        ]
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._seen: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Distill:
        self._handles = [self.student.register_forward_pre_hook(self._called, with_kwargs=True)]
        for module in {id(m): m for pair in self._pairs for m in pair}.values():
            self._handles.append(module.register_forward_hook(self._passed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._call, self._seen = [], None, {}

    def __call__(
        self, loss: Tensor, output: Any, where: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, ""]:
        """The whole loss, given the task's and the output of the student's last call.

        `where` says which positions count, of the logits' shape without the classes: not padding, say.
        """
        if self._call is None:
            raise SecateurError(
                "Distill learns from the student's last call, and there was none inside its `with` block."
            )
        states = [self._state(student, "student") for student, _ in self._pairs]
        args, kwargs = self._call
        with evaluation(self.teacher), torch.no_grad():
            wanted = logits_of(self.teacher(*args, **kwargs))
        logits = logits_of(output)
        if logits.shape != wanted.shape:
            raise SecateurError(
                f"The student's logits have shape {tuple(logits.shape)}, the teacher's {tuple(wanted.shape)}."
            )
        total = (1 - self.weight) * loss + self.weight * self._divergence(logits, wanted, where)
        for (_, teacher), (name, _), state in zip(self._pairs, self.hidden.items(), states, strict=True):
            goal = self._state(teacher, "teacher")
            if state.shape != goal.shape:
                raise SecateurError(
                    f"The output of {name} has shape {tuple(state.shape)}, its teacher's {tuple(goal.shape)}."
                )
            distance = (state.float() - goal.float()).square().sum() / goal.float().square().sum()
            total = total + self.hidden_weight * distance
        return total

    def _divergence(
        self, logits: Float[Tensor, "*n classes"], wanted: Float[Tensor, "*n classes"], where: Tensor | None
    ) -> Tensor:
        ours = F.log_softmax(logits.float() / self.temperature, -1)
        theirs = F.log_softmax(wanted.float() / self.temperature, -1)
        each = (theirs.exp() * (theirs - ours)).sum(-1)
        if where is None:
            return self.temperature**2 * each.mean()
        return self.temperature**2 * each[where].sum() / where.sum().clamp(min=1)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = (args, kwargs)
        self._seen = {}

    def _passed(self, module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor):
            self._seen[id(module)] = first

    def _state(self, module: nn.Module, whose: str) -> Tensor:
        seen = self._seen.get(id(module))
        if seen is None:
            raise SecateurError(f"A hidden module of the {whose} gave no tensor in its last call.")
        return seen


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: the tensor itself, or what it calls so."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise SecateurError(
            f"Distill needs logits: a tensor, or an output with .logits; got {type(output).__name__}."
        )
    return found


def _module(model: nn.Module, name: str, whose: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SelectionError(f"The {whose} has no module {name!r}.") from None
