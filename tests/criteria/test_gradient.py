"""First-order criteria against loops of single-example backward passes, gates and finite differences."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import secateur as sc
from secateur.core.names import select
from tests.reference import (
    Tied,
    Twice,
    bert,
    close,
    example_gradients,
    examples,
    gpt2,
    llama,
    next_token,
    weight,
)

CRITERIA = {
    sc.Taylor(): lambda w, g: (w * g).abs().mean(0),
    sc.TaylorSquared(): lambda w, g: (w * g).square().mean(0),
    sc.TaylorGroup(): lambda w, g: (w * g).sum(2).square().mean(0)[:, None].expand(w.shape) / w.shape[1],
    sc.SNIP(): lambda w, g: (w * g.mean(0)).abs(),
}


def scores(model, criterion, batches, loss=F.cross_entropy) -> dict[str, Tensor]:
    """Scores of every selected layer, and the proof that the fast path was taken."""
    collected = sc.collect(model, criterion.needs, batches, loss)
    assert not any("one example at a time" in note for note in collected.notes)
    targets = select(model).targets
    return {t.name: criterion(t.matrix, collected.stats[t.name]) for t in targets}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Dropout(0.5), nn.Linear(5, 3))


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided groups": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, (3, 2), groups=4, bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, (2, 3), dilation=(2, 3), padding=(1, 2)),
    "same, even kernel": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", stride=(1, 2)),
}


def vision(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        layer,
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    model(torch.randn(2, 3, 7, 8))
    return model


MODELS = {
    "mlp": (mlp, (6,)),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Flatten(), nn.Linear(12, 3)),
        (3, 5),
    ),
    "one dimensional": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, stride=2, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (3, 9),
    ),
    "three dimensional": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2, padding=1), nn.Flatten(), nn.Linear(144, 3)),
        (2, 2, 2, 3),
    ),
    "module used twice": (Twice, (4, 5)),
    "tied weights": (Tied, (5,)),
} | {f"conv {name}": (lambda make=make: vision(make()), (3, 7, 8)) for name, make in CONVOLUTIONS.items()}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_equals_a_loop_of_single_examples(kind, criterion):
    make, shape = MODELS[kind]
    model, x, y = make(), torch.randn(7, *shape), torch.randint(0, 3, (7,))
    found = scores(model, criterion, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert len(found) > 0
    for name, g in example_gradients(model, examples(x, y), F.cross_entropy, found).items():
        assert close(found[name], CRITERIA[criterion](weight(model, name), g)), name


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_equals_a_loop_of_single_examples_on_transformers(make):
    model, ids = make(), torch.randint(0, 50, (5, 8))
    found = scores(model, sc.Taylor(), [(ids[:2], ids[:2]), (ids[2:], ids[2:])], next_token)
    assert len(found) >= 8
    for name, g in example_gradients(model, examples(ids, ids), next_token, found).items():
        assert close(found[name], (weight(model, name) * g).abs().mean(0), 1e-4), name


def test_keyword_arguments_and_a_mapping_as_the_target():
    model, ids = gpt2(), torch.randint(0, 50, (5, 8))
    found = scores(
        model, sc.Taylor(), [{"input_ids": ids}], lambda out, batch: next_token(out, batch["input_ids"])
    )
    for name, g in example_gradients(model, examples(ids, ids), next_token, found).items():
        assert close(found[name], (weight(model, name) * g).abs().mean(0), 1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_the_fast_path_and_score_in_float32(dtype):
    model, x, y = vision(nn.Conv2d(4, 6, 3)), torch.randn(6, 3, 7, 8), torch.randint(0, 3, (6,))
    exact = scores(model, sc.Taylor(), [(x, y)])
    found = scores(
        model.to(dtype), sc.Taylor(), [(x.to(dtype), y)], lambda out, t: F.cross_entropy(out.float(), t)
    )
    for name in exact:
        assert found[name].dtype == torch.float32
        assert close(found[name], exact[name], 0.03), name


def opposite() -> tuple[nn.Module, Tensor, Tensor]:
    """Two examples whose gradients cancel."""
    model = nn.Linear(2, 1, bias=False)
    return model, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.zeros(2, 1)


def total(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).mean()


def test_the_absolute_value_is_taken_for_each_example():
    model, x, y = opposite()
    w = model.weight.detach()
    assert torch.equal(scores(model, sc.SNIP(), [(x, y)], total)["weight"], torch.zeros(1, 2))
    assert close(scores(model, sc.Taylor(), [(x, y)], total)["weight"], w.abs() * torch.tensor([1.0, 2.0]))
    assert close(
        scores(model, sc.TaylorSquared(), [(x, y)], total)["weight"], (w * torch.tensor([1.0, 2.0])) ** 2
    )


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if not isinstance(c, sc.SNIP)], ids=str)
def test_scores_of_examples_do_not_shrink_with_the_batch(criterion):
    model, x, y = mlp(), torch.randn(64, 6), torch.randint(0, 3, (64,))
    one = scores(model, criterion, [(a[None], b[None]) for a, b in zip(x, y, strict=True)])
    for size in (7, 64):
        batches = list(zip(x.split(size), y.split(size), strict=True))
        for name, found in scores(model, criterion, batches).items():
            assert close(found, one[name])


def test_taylor_is_the_first_order_change_of_the_loss():
    model, x, y = mlp().double().eval(), torch.randn(4, 6).double(), torch.randint(0, 3, (4,))
    found, eps = scores(model, sc.Taylor(), [(x, y)])["0.weight"], 1e-6
    before = F.cross_entropy(model(x), y, reduction="none").detach()
    for i, j in [(0, 0), (3, 2), (7, 5)]:
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled[0].weight[i, j] *= 1 - eps
        change = (F.cross_entropy(scaled(x), y, reduction="none") - before) / eps
        assert found[i, j].item() == pytest.approx(change.abs().mean().item(), rel=1e-4)


class Gated(nn.Module):
    """A layer whose output before the bias is multiplied by a gate for each channel."""

    def __init__(self, layer: nn.Module, gate: Tensor) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (self.layer.weight.dim() - 2))
        bias = self.layer.bias.view(shape)
        return (self.layer(x) - bias) * self.gate.view(shape) + bias


@pytest.mark.parametrize(("kind", "index"), [("mlp", 0), ("conv strided groups", 3), ("conv reflect", 3)])
def test_taylor_group_is_the_squared_gradient_of_a_gate_on_each_output(kind, index):
    make, shape = MODELS[kind]
    model, x, y = make().eval(), torch.randn(5, *shape), torch.randint(0, 3, (5,))
    found = scores(model, sc.TaylorGroup(), [(x, y)])[f"{index}.weight"]
    gate = torch.ones(found.shape[0], requires_grad=True)
    gated = copy.deepcopy(model)
    gated[index] = Gated(gated[index], gate)
    squares = [
        torch.autograd.grad(F.cross_entropy(gated(x[i : i + 1]), y[i : i + 1]), gate)[0] ** 2
        for i in range(5)
    ]
    assert close(found.sum(1), torch.stack(squares).mean(0))
    assert torch.equal(found, found[:, :1].expand_as(found))


def test_taylor_group_is_the_gate_of_a_batch_norm_without_a_shift():
    # gamma dgamma + beta dbeta is the gradient of a gate after the norm. The norm is y -> a y + c with
    # c = beta - gamma mean / std, and a gate before it leaves c alone: they agree where c = 0.
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.running_var.uniform_(0.5, 2)
        norm.running_mean.normal_()
        norm.bias.copy_(norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = torch.randn(6, 3, 6, 6), torch.randint(0, 3, (6,))
    found = scores(model, sc.TaylorGroup(), [(x, y)])["0.weight"].sum(1)
    squares = []
    for i in range(6):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        dgamma, dbeta = torch.autograd.grad(loss, [norm.weight, norm.bias])
        squares.append((norm.weight * dgamma + norm.bias * dbeta).detach() ** 2)
    assert close(found, torch.stack(squares).mean(0), 1e-4)


def test_the_joint_form_sees_cancellation_inside_a_row_and_the_independent_one_does_not():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -3.0]]))
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    assert torch.equal(scores(model, sc.TaylorGroup(), batches, total)["weight"], torch.zeros(1, 2))
    assert close(scores(model, sc.TaylorSquared(), batches, total)["weight"], torch.tensor([[9.0, 9.0]]))


def test_snip_is_the_derivative_of_the_loss_for_a_gate_on_each_weight():
    model, x, y = mlp().eval(), torch.randn(9, 6), torch.randint(0, 3, (9,))
    found = scores(model, sc.SNIP(), [(x, y)])
    gates = {name: torch.ones_like(model.get_parameter(name), requires_grad=True) for name in found}
    gated = {name: model.get_parameter(name).detach() * gate for name, gate in gates.items()}
    loss = F.cross_entropy(functional_call(model, gated, (x,)), y)
    for name, derivative in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
        assert close(found[name], derivative.abs())


def test_snip_sums_over_batches_of_unequal_size_before_the_absolute_value():
    model, x, y = mlp(), torch.randn(11, 6), torch.randint(0, 3, (11,))
    whole = scores(model, sc.SNIP(), [(x, y)])
    split = scores(model, sc.SNIP(), [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])])
    for name in whole:
        assert close(split[name], whole[name])
    model, x, y = opposite()
    cancelled = scores(model, sc.Taylor(), [(x[:1], y[:1]), (x[1:], y[1:])], total)["weight"]
    found = sc.collect(model, sc.SNIP().needs, [(x[:1], y[:1]), (x[1:], y[1:])], total)
    assert torch.equal(found.stats["weight"][sc.GradMean()], torch.zeros(1, 2))
    assert bool((cancelled > 0).all())
    assert found.notes == (
        "GradMean() of weight is 0 everywhere: on this data nothing tells its weights apart.",
    )
