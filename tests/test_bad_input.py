"""Bad input is one clear sentence of the right class, and the model is as it was, to the bit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.core.errors import (
    BudgetError,
    NonFiniteError,
    PatternError,
    SecateurError,
    SelectionError,
    SparsityError,
    StatsError,
)


def network() -> nn.Module:
    """In no mode, state or set-up that pruning might restore by accident."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(24, 5),
        nn.Linear(5, 3),
    )
    x, y = batches()[0]
    F.cross_entropy(
        model(x), y
    ).backward()  # gradients, and statistics of normalisation that are not the initial ones
    model[6].bias.grad = None
    model[1].eval()
    model[5].weight.requires_grad_(False)
    with torch.no_grad():
        model[5].weight[0, 0] = -0.0
    model[0].register_forward_hook(lambda *_: None)
    model[5].register_forward_pre_hook(lambda *_: None)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 2, 4, 4, generator=g), torch.randint(0, 3, (4,), generator=g)) for _ in range(2)]


def bytes_of(t: Tensor | None) -> bytes | None:
    return None if t is None else t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failed call must leave alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {n: bytes_of(t) for n, t in model.state_dict().items()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "grads": {n: bytes_of(p.grad) for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [list(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "grad mode": torch.is_grad_enabled(),
    }


@dataclass(frozen=True)
class Odd:
    """A criterion that calls `act` on the weight; fails at the call numbered `fails_at`."""

    act: Callable[[Tensor], Tensor] = torch.abs
    rounds: int = 1
    fails_at: int | None = None
    calls: list[int] = field(default_factory=list)
    needs = ()

    def __call__(self, weight, stats):
        self.calls.append(int((weight == 0).sum()))
        if len(self.calls) == self.fails_at:
            raise ZeroDivisionError("in the middle")
        return self.act(weight)


def half_in_first_layer(layers, sparsity):
    return {x.name: 0.5 * (i == 0) for i, x in enumerate(layers)}


def nan_loss(output, target):
    return F.cross_entropy(output, target) * math.nan


def vector_loss(output, target):
    return F.cross_entropy(output, target, reduction="none")


def nan_inputs():
    return [(batches()[0][0] * math.nan, batches()[0][1])]


WITH_DATA = dict(batches=batches(), loss=F.cross_entropy)
NAN_LOSS = dict(batches=batches(), loss=nan_loss)
M = sc.Magnitude()

# what is passed to prune_, the class of the error, what it says
CASES: dict[str, tuple[tuple, dict[str, Any], type[SecateurError], str]] = {
    # sparsity
    "sparsity below 0": ((M, -0.01), {}, SparsityError, r"between 0 and 1; got -0\.01"),
    "sparsity above 1": ((M, 50), {}, SparsityError, "between 0 and 1; got 50"),
    "sparsity nan": ((M, math.nan), {}, SparsityError, "between 0 and 1; got nan"),
    "no sparsity": ((M,), {}, SparsityError, "allocation=uniform needs a sparsity"),
    "rounds 0": ((M, 0.5), dict(rounds=0), SecateurError, "rounds is at least 1"),
    "rounds to nowhere": (
        (M,),
        dict(rounds=2, allocation=sc.custom({"*": 0.5})),
        SecateurError,
        "need a sparsity to go to",
    ),
    # budgets that cannot be met
    "nm below its minimum": (
        (M, 0.3),
        dict(pattern=sc.NM(1, 2)),
        PatternError,
        r"NM\(1, 2\) removes at least 0\.5",
    ),
    "nm with a global ranking": (
        (Odd(lambda w: w.abs() * w.numel()), 0.5),
        dict(pattern=sc.NM(1, 2), allocation=sc.global_),
        PatternError,
        "ask for 0.5 with allocation=uniform",
    ),
    "nm in rounds": ((M, 0.5), dict(pattern=sc.NM(1, 2), rounds=3), PatternError, "In 3 rounds .* rounds=1"),
    "allocation misses the total": (
        (M, 0.9),
        dict(allocation=half_in_first_layer),
        BudgetError,
        "removes 54 of 228 units instead of 205",
    ),
    "allocation forgets a layer": (
        (M, 0.5),
        dict(allocation=lambda layers, s: {layers[0].name: s}),
        BudgetError,
        r"gave 5\.weight a sparsity of None",
    ),
    "allocation beyond 1": (
        (M, 0.5),
        dict(allocation=lambda layers, s: {x.name: 1.01 for x in layers}),
        BudgetError,
        r"gave 0\.weight a sparsity of 1\.01, outside",
    ),
    "custom misses the total": (
        (M, 0.9),
        dict(allocation=sc.custom({"*": 0.1})),
        BudgetError,
        "not to the asked 0.9",
    ),
    "custom names no layer": (
        (M,),
        dict(allocation=sc.custom({"fc": 0.1, "*": 0.2})),
        SelectionError,
        "'fc' matches none",
    ),
    "threshold and a total": (
        (M, 0.5),
        dict(allocation=sc.Threshold(1.0)),
        BudgetError,
        "decides the sparsity itself",
    ),
    # patterns that do not fit
    "nm does not divide": (
        (M, 0.5),
        dict(pattern=sc.NM(2, 4)),
        PatternError,
        r"multiple of 4, but 0\.weight has 2\. Exclude it",
    ),
    "block does not divide": (
        (M, 0.5),
        dict(pattern=sc.Block(6, 1)),
        PatternError,
        r"but 5\.weight has 5 x 24\. Exclude it",
    ),
    # statistics
    "no batches": (
        (sc.Wanda(), 0.5),
        {},
        StatsError,
        r"InputNorm\(\) must be measured on data: pass batches=",
    ),
    "no batches for gradients": ((sc.Taylor(), 0.5), dict(loss=F.cross_entropy), StatsError, "pass batches="),
    "no loss": ((sc.Taylor(), 0.5), dict(batches=batches()), StatsError, "needs a loss: pass loss="),
    "no loss for the mean": (
        (sc.SNIP(), 0.5),
        dict(batches=batches()),
        StatsError,
        "needs a loss: pass loss=",
    ),
    "no targets": (
        (sc.SNIP(), 0.5),
        dict(batches=[batches()[0][0]], loss=F.cross_entropy),
        StatsError,
        "a loss needs targets",
    ),
    "a loss of many numbers": (
        (sc.SNIP(), 0.5),
        WITH_DATA | dict(loss=vector_loss),
        StatsError,
        "one number, the mean over the batch",
    ),
    "statistics of another criterion": (
        (sc.Wanda(), 0.5),
        dict(stats=sc.Collected({}, ())),
        StatsError,
        r"Wanda\(\) needs InputNorm\(\), which was not collected",
    ),
    "empty list": ((sc.Wanda(), 0.5), dict(batches=[]), StatsError, "No batches"),
    "empty generator": (
        (sc.OBD(), 0.5),
        dict(batches=iter([]), loss=F.cross_entropy),
        StatsError,
        "No batches",
    ),
    "one tensor": (
        (sc.Wanda(), 0.5),
        dict(batches=batches()[0][0]),
        StatsError,
        "not a single Tensor: wrap it in a list",
    ),
    "one mapping": (
        (sc.Wanda(), 0.5),
        dict(batches={"input": batches()[0][0]}),
        StatsError,
        "not a single dict: wrap",
    ),
    "a string": ((sc.Wanda(), 0.5), dict(batches="data"), StatsError, "not a single str"),
    "batches of three": (
        (sc.Wanda(), 0.5),
        dict(batches=[(1, 2, 3)]),
        StatsError,
        r"A batch is \(inputs, target\)",
    ),
    # values
    "nan loss, examples": (
        (sc.Taylor(), 0.5),
        NAN_LOSS,
        NonFiniteError,
        r"GradAbs\(\) of 0\.weight is not finite",
    ),
    "nan loss, mean": ((sc.SNIP(), 0.5), NAN_LOSS, NonFiniteError, "is not finite"),
    "nan loss, curvature": (
        (sc.OBD(sc.HutchinsonDiagonal(2)), 0.5),
        NAN_LOSS,
        NonFiniteError,
        "is not finite",
    ),
    "nan loss, grasp": ((sc.GraSP(), 0.5), NAN_LOSS, NonFiniteError, "is not finite"),
    "nan input": ((sc.Wanda(), 0.5), dict(batches=nan_inputs()), NonFiniteError, "InputNorm.* is not finite"),
    "nan scores": (
        (Odd(lambda w: w * math.nan), 0.5),
        {},
        NonFiniteError,
        r"gave NaN or infinite scores for 0\.weight",
    ),
    "nan scores, rows": (
        (Odd(lambda w: w.abs().log() * 0), 0.5),  # 0 times the log of 0, at one weight of the second layer
        dict(pattern=sc.PerRow()),
        NonFiniteError,
        r"gave NaN or infinite scores for 5\.weight",
    ),
    "infinite scores": ((Odd(lambda w: w.abs() / 0), 0.5), {}, NonFiniteError, "gave NaN or infinite scores"),
    "scores of another shape": (
        (Odd(lambda w: w.sum(dim=1)), 0.5),
        {},
        SecateurError,
        r"gave scores of shape \(6,\) for 0\.weight, a matrix of \(6, 18\)",
    ),
    # selection
    "nothing matches": (
        (M, 0.5),
        dict(where=sc.Where(include="conv1")),
        SelectionError,
        "matches no parameter",
    ),
    "nothing is left": (
        (M, 0.5),
        dict(where=sc.Where(exclude="*")),
        SelectionError,
        "Nothing to prune is selected",
    ),
    "only the head": ((M, 0.5), dict(where=sc.Where(include="6")), SelectionError, "part of the output head"),
    # classes for instances
    "a class for a criterion": ((sc.Magnitude, 0.5), {}, SecateurError, r"pass Magnitude\(\.\.\.\)"),
    "a class for a pattern": ((M, 0.5), dict(pattern=sc.PerRow), SecateurError, r"pass PerRow\(\.\.\.\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_sentence_and_changes_nothing(case):
    args, kwargs, error, says = CASES[case]
    model = network()
    before = state(model)
    with pytest.raises(error, match=says) as caught:
        sc.prune_(model, *args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 400
    assert message[-1] in ".?)"
    assert state(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value):
    model = network()
    with torch.no_grad():
        model[5].weight[3, 7] = value
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"5\.weight holds NaN or infinite weights") as caught:
        sc.prune_(model, M, 0.5)
    assert state(model) == before
    assert "exclude='5.weight'" in str(caught.value)
    sc.prune_(model, M, 0.5, where=sc.Where(exclude="5.weight"))  # the way out that the message shows


@pytest.mark.parametrize("criterion", [sc.Wanda(), sc.RIA()], ids=repr)
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 2, 3), nn.GRU(4, 4)], ids=lambda m: type(m).__name__)
def test_a_layer_whose_traffic_a_criterion_does_not_know(layer, criterion):
    model = nn.ModuleList([layer, nn.Linear(4, 4)])
    model.forward = lambda x: model[0](x)
    before = state(model)
    with pytest.raises(StatsError, match=r"0\.weight.* exclude it"):
        sc.prune_(
            model,
            criterion,
            0.5,
            batches=[
                torch.randn(2, 2, 4, 4)[:, :, 0] if isinstance(layer, nn.GRU) else torch.randn(2, 2, 4, 4)
            ],
        )
    assert state(model) == before


def test_synflow_on_token_ids():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    before = state(model)
    with pytest.raises(StatsError, match="takes integers"):
        sc.prune_(model, sc.SynFlow(), 0.5, batches=[torch.tensor([[1, 2]])])
    assert state(model) == before


@pytest.mark.parametrize("fails_at", [1, 3, 4, 5, 9])
def test_a_failure_in_the_middle_of_rounds_puts_the_weights_back(fails_at):
    model = network()
    before = state(model)
    criterion = Odd(rounds=5, fails_at=fails_at)  # two layers a round
    with pytest.raises(ZeroDivisionError):
        sc.prune_(model, criterion, 0.9)
    assert len(criterion.calls) == fails_at
    if fails_at > 2:
        assert criterion.calls[-1] > 1  # weights were indeed zero when it failed
    assert state(model) == before


def test_a_failure_of_the_statistics_in_the_middle_of_synflow_puts_the_weights_back():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
            self.zeros = []

        def forward(self, x):
            self.zeros.append(int((self.first.weight == 0).sum()))
            if len(self.zeros) == 3:
                raise ZeroDivisionError("in the middle")
            return self.second(self.first(x))

    model = Fragile()
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        sc.prune_(model, sc.SynFlow(rounds=10), 0.9, batches=[torch.ones(1, 4)])
    assert model.zeros[2] > model.zeros[0] == 0
    assert state(model) == before


def test_a_model_that_fails_on_its_batch_or_its_example_is_left_as_it_was():
    for how in (
        dict(batches=[torch.ones(2, 3, 4, 4)]),
        dict(batches=[torch.ones(2, 2, 4, 4)], example=torch.ones(2, 3, 4, 4)),
    ):
        model = network()
        before = state(model)
        with pytest.raises(RuntimeError):
            sc.prune_(model, sc.Wanda(), 0.5, **how)
        assert state(model) == before


def test_a_good_call_keeps_modes_gradients_and_hooks_too():
    model = network()
    before = state(model)
    for criterion in (sc.Taylor(), sc.SNIP(), sc.GraSP()):
        sc.prune_(model, criterion, 0.5, **WITH_DATA)
    sc.prune_(model, sc.SynFlow(rounds=3), 0.6, batches=batches(), example=batches()[0][0])
    after = state(model)
    changed = {n for n, b in after.pop("tensors").items() if b != before["tensors"][n]}
    assert changed == {"0.weight", "5.weight"}
    before.pop("tensors")
    assert after == before


def test_a_forward_pass_that_fails_on_the_pruned_weights_undoes_the_pruning() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((self.body.weight == 0).any()):
                raise ArithmeticError("a division by zero, say")
            return self.head(self.body(x))

    model = Fragile()
    before = model.body.weight.detach().clone()
    with pytest.raises(ArithmeticError):
        sc.prune_(model, sc.Magnitude(), 0.5, example=torch.zeros(1, 8))
    assert torch.equal(model.body.weight, before)
