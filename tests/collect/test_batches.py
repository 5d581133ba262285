"""The forms in which batches come, how examples are cut out of them, and what is refused."""

from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.collect.batches import Batches, as_batches, example_losses, mean_loss

CPU = torch.device("cpu")
X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 1, 0])


def only(item: object):
    (batch,) = list(Batches([item], CPU))
    return batch


@pytest.mark.parametrize("pair", [(X, Y), [X, Y], namedtuple("Pair", "inputs target")(X, Y)], ids=str)
def test_a_pair_is_inputs_and_target(pair):
    batch = only(pair)
    assert batch.args == (X,) and batch.kwargs == {} and batch.target is Y
    assert batch.size == 4


def test_inputs_may_be_several():
    batch = only(((X, X + 1), Y))
    assert batch.args[0] is X and torch.equal(batch.args[1], X + 1) and batch.target is Y


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_a_mapping_of_any_class_holds_keyword_arguments(mapping):
    with_target = only((mapping(x=X), Y))
    assert with_target.args == () and with_target.kwargs == {"x": X} and with_target.target is Y
    alone = only(mapping(x=X, labels=Y))
    assert alone.kwargs == {"x": X, "labels": Y} and alone.target == {"x": X, "labels": Y}


def test_the_batch_of_a_tokenizer_is_a_mapping():
    from transformers import BatchEncoding

    batch = only(BatchEncoding({"input_ids": Y[None], "attention_mask": torch.ones(1, 4)}))
    assert type(batch.kwargs) is dict and list(batch.kwargs) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("item", [X, (X,), [X]], ids=["tensor", "tuple of one", "list of one"])
def test_a_tensor_alone_has_no_target(item):
    batch = only(item)
    assert batch.args[0] is X and batch.target is None


@pytest.mark.parametrize(
    ("batches", "passes"),
    [
        ([(X, Y)], 2),
        (DataLoader(TensorDataset(X, Y), batch_size=3), 2),
        (((X, Y) for _ in range(3)), 2),
        (zip([X], [Y], strict=True), 2),
    ],
    ids=["list", "loader", "generator", "iterator"],
)
def test_batches_can_be_read_again(batches, passes):
    data = as_batches(batches, CPU, "")
    first, *again = [[b.size for b in data] for _ in range(passes)]
    assert first and again == [first]


def test_every_form_gives_the_same_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    reference = None
    for batches in (
        [(X, Y)],
        [[X[:3], Y[:3]], [X[3:], Y[3:]]],
        [({"input": X}, Y)],
        (pair for pair in [(X, Y)]),
        DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
    ):
        found = sc.collect(model, [sc.GradAbs()], batches, F.cross_entropy).stats["0.weight"][sc.GradAbs()]
        reference = found if reference is None else reference
        torch.testing.assert_close(found, reference)


def test_a_part_cuts_every_tensor_of_examples_and_nothing_else():
    mask, table = torch.arange(4), torch.randn(2, 4)
    part = only(({"x": X, "more": [mask, table, "text", 7]}, Y)).part(1, 3)
    assert torch.equal(part.kwargs["x"], X[1:3])
    assert torch.equal(part.kwargs["more"][0], mask[1:3])
    assert part.kwargs["more"][1:] == (table, "text", 7)
    assert torch.equal(part.target, Y[1:3])


def test_losses_of_examples_are_those_of_each_alone():
    output, batch = torch.randn(4, 2), only((X, Y))
    losses = example_losses(output, batch, F.cross_entropy)
    torch.testing.assert_close(losses, F.cross_entropy(output, Y, reduction="none"))
    torch.testing.assert_close(losses.mean(), mean_loss(output, batch, F.cross_entropy))


@pytest.mark.parametrize("wrap", [dict, UserDict, namedtuple("Output", "loss")])
def test_a_model_may_return_its_loss(wrap):
    assert mean_loss(wrap(loss=torch.tensor([2.5])), only(X), None) == 2.5


def run(batches: object, loss: object = F.cross_entropy, stat: object = None) -> None:
    sc.collect(nn.Linear(3, 2), [stat or sc.GradAbs()], batches, loss)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"GradAbs\(\) must be measured on data: pass batches="),
        ([], "batches=... is empty"),
        (iter([]), "batches=... is empty"),
        (X, "a list or loader of batches, not a single Tensor: wrap it in a list"),
        ({"x": X}, "not a single dict"),
        ("data", "not a single str"),
        ([(X, Y, Y)], "got tuple of 3"),
        ([7], "got int"),
        (["text"], "got str"),
        ([((), Y)], "hold no tensor with a dimension of examples"),
        ([(torch.tensor(1.0), Y)], "hold no tensor with a dimension of examples"),
        ([(X[:0], Y[:0])], "holds no examples"),
        ([X], r"hold inputs only, but a loss needs targets: pass pairs"),
        ([(X, Y[:3])], "4 examples but a target of 3 rows"),
    ],
)
def test_bad_batches_are_refused_with_what_to_do(batches, message):
    with pytest.raises(sc.StatsError, match=message):
        run(batches)


@pytest.mark.parametrize("stat", [sc.GradAbs(), sc.GradMean()])
def test_bad_losses_are_refused_with_what_to_do(stat):
    def each(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.repeat(2, 1), target.repeat(2), reduction="none")

    with pytest.raises(sc.StatsError, match=r"one number, the mean over the batch; .* gave shape"):
        run([(X, Y)], each, stat)
    with pytest.raises(sc.StatsError, match="gave float"):
        run([(X, Y)], lambda output, target: 1.0, stat)
    with pytest.raises(sc.StatsError, match="pass loss=function"):
        run([(X, Y)], None, stat)
    with pytest.raises(sc.StatsError, match="does not depend on any weight: it was detached"):
        run([(X, Y)], lambda output, target: F.cross_entropy(output.detach(), target), stat)
    with pytest.raises(sc.StatsError, match="a function that has no gradient"):
        run([(X, Y)], lambda output, target: (output.argmax(1) == target).float().mean(), stat)


def test_a_loss_that_is_not_finite_is_refused_with_the_layer():
    for stat in (sc.GradAbs(), sc.GradMean(), sc.HessianGradient(1)):
        with pytest.raises(sc.NonFiniteError, match="of weight is not finite: look for NaN"):
            run([(X * float("nan"), Y)], F.cross_entropy, stat)
    with pytest.raises(sc.NonFiniteError, match=r"InputNorm\(\) of weight is not finite"):
        run([X * float("inf")], None, sc.InputNorm())
