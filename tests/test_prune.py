"""One-shot pruning of whole models: exact counts, the right weights, and a report that tells the truth."""

import copy
import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import secateur as sc
from secateur.core.errors import PatternError, SecateurError
from secateur.core.names import select
from secateur.core.topk import count

EVERYTHING = sc.Where(also="*.weight")  # the last layer too
PATTERNS = [
    sc.Unstructured(),
    sc.PerRow(),
    sc.NM(2, 4),
    sc.NM(1, 4),
    sc.NM(3, 4),
    sc.Block(2, 2),
    sc.Block(1, 4),
]
ALLOCATIONS = [sc.uniform, sc.global_, sc.erk, sc.lamp, sc.threshold]
FREE = [sc.custom({"0": 0.9, "*": 0.25}), sc.Threshold(0.7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def name_of(member: object) -> str:
    return getattr(member, "__name__", repr(member))


def zeros(model: nn.Module, where: sc.Where | None = None) -> dict[str, int]:
    return {t.name: int((t.weight == 0).sum()) for t in select(model, where).targets}


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the model to the bit, so that -0.0 and NaN count too."""
    return {
        n: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for n, t in model.state_dict().items()
    }


def randn_(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


# ------ exact counts


@st.composite
def layer_shapes(draw):
    """Linear and convolution layers whose outputs and input channels are multiples of four."""
    shapes = []
    for _ in range(draw(st.integers(1, 4))):
        out, width = 4 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
        shapes.append((out, width, *draw(st.sampled_from([(), (), (2,), (1, 3)]))))
    return shapes


def model_of(shapes: list[tuple[int, ...]], dtype: torch.dtype, how: str, seed: int) -> nn.Module:
    """Layers with the given weights' shapes, their values full of ties."""
    g = torch.Generator().manual_seed(seed)
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
    layers = []
    for shape in shapes:
        out, width, *kernel = shape
        layers.append(kinds[len(shape)](width, out, *([tuple(kernel)] if kernel else [])).to(dtype))
        draws = {
            "few values": torch.randint(1, 4, shape, generator=g)
            * torch.tensor([-1, 1])[torch.randint(0, 2, shape, generator=g)],
            "constant": torch.full(shape, 0.5),
            "normal": torch.randn(shape, generator=g) + 1e-3,
            "zeros among few values": torch.randint(-1, 2, shape, generator=g),
            "all zeros": torch.zeros(shape),
        }
        with torch.no_grad():
            layers[-1].weight.copy_(draws[how])
    return nn.ModuleList(layers)


FULL = ["few values", "constant", "normal"]
sparsities = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))


@settings(max_examples=12)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=name_of)
@given(
    shapes=layer_shapes(),
    sparsity=sparsities,
    how=st.sampled_from(FULL),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_zeros_are_counted_for_every_pattern_and_allocation(
    allocation, pattern, shapes, sparsity, how, dtype, seed
):
    model = model_of(shapes, dtype, how, seed)
    before = bits(model)
    entries = sum(math.prod(s) for s in shapes)
    unit = pattern.unit
    try:
        report = sc.prune_(
            model, sc.Magnitude(), sparsity, pattern=pattern, allocation=allocation, where=EVERYTHING
        )
    except PatternError as error:
        assert isinstance(pattern, sc.NM) and "cannot be had" in str(error)
        assert bits(model) == before
        if allocation is sc.uniform:  # refused only where no layer could have it
            assert sparsity * entries < entries * (1 - pattern.n / pattern.m)
        return
    asked = unit * count(sparsity, entries // unit)
    assert sum(zeros(model, EVERYTHING).values()) == asked
    assert report.removed == asked
    assert report.masks.entries - report.masks.kept == asked
    for name, tensor in model.state_dict().items():
        kept = report.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        old = torch.frombuffer(bytearray(before[name]), dtype=dtype).view(tensor.shape)
        assert torch.equal(tensor, torch.where(kept, old, 0))


@settings(max_examples=25)
@given(
    shapes=layer_shapes(),
    sparsity=sparsities,
    seed=st.integers(0, 99),
    allocation=st.sampled_from(ALLOCATIONS),
    how=st.sampled_from(["zeros among few values", "all zeros"]),
    dtype=st.sampled_from(DTYPES),
)
def test_weights_that_are_zero_already_go_first_and_count(shapes, sparsity, seed, allocation, how, dtype):
    model = model_of(shapes, dtype, how, seed)
    before = zeros(model, EVERYTHING)
    report = sc.prune_(model, sc.Random(), sparsity, allocation=allocation, where=EVERYTHING)
    assert report.removed == count(sparsity, sum(math.prod(s) for s in shapes))
    for layer in report.layers:
        assert zeros(model, EVERYTHING)[layer.name] == layer.zeros == max(layer.removed, before[layer.name])
    if allocation is sc.global_:
        assert sum(zeros(model, EVERYTHING).values()) == max(report.removed, sum(before.values()))


@pytest.mark.parametrize(
    ("pattern", "weight"),
    [
        (sc.Unstructured(), [[0.0, 0.0, 0.0, 6.0], [0.0, 2.0, 3.0, 4.0]]),
        (sc.PerRow(), [[0.0, 0.0, 5.0, 6.0], [7.0, 0.0, 0.0, 8.0]]),
        (sc.NM(2, 4), [[0.0, 5.0, 0.0, 6.0], [7.0, 0.0, -0.0, 8.0]]),
        (sc.Block(1, 2), [[0.0, 0.0, 5.0, 6.0], [7.0, 8.0, 0.0, 0.0]]),
        (sc.Block(2, 1), [[0.0, 5.0, 0.0, 6.0], [0.0, 8.0, 0.0, 1.0]]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("seed", range(5))
def test_no_living_weight_goes_while_a_zero_beside_it_could(pattern, weight, seed):
    model = nn.Linear(4, 2)
    model.weight.data = torch.tensor(weight)
    sc.prune_(model, sc.Random(seed), 0.5, pattern=pattern)
    assert torch.equal(model.weight, torch.tensor(weight))


@pytest.mark.parametrize("allocation", FREE, ids=name_of)
@pytest.mark.parametrize("pattern", [sc.Unstructured(), sc.PerRow(), sc.Block(2, 2)], ids=repr)
def test_allocations_that_decide_the_sparsity_themselves(allocation, pattern):
    model = model_of([(8, 8), (12, 8), (4, 8, 3)], torch.float32, "normal", 0)
    report = sc.prune_(model, sc.Magnitude(), pattern=pattern, allocation=allocation, where=EVERYTHING)
    assert sum(zeros(model, EVERYTHING).values()) == report.removed
    assert report.settings["sparsity"] == "as allocated"
    for layer in report.layers:
        units = layer.entries // pattern.unit
        asked = {"0.weight": 0.9}.get(layer.name, 0.25)
        if isinstance(allocation, sc.Custom):
            assert layer.removed == pattern.unit * count(asked, units)
        else:
            assert 0 < layer.removed == round(layer.asked * layer.entries) < layer.entries


def test_pruning_further_keeps_what_was_pruned_and_counts_it():
    model = model_of([(16, 16), (8, 8, 3)], torch.bfloat16, "normal", 1)
    first = sc.prune_(model, sc.Magnitude(), 0.4, where=EVERYTHING).masks
    second = sc.prune_(model, sc.Random(), 0.8, where=EVERYTHING).masks
    assert second <= first
    assert sum(zeros(model, EVERYTHING).values()) == count(0.8, 16 * 16 + 8 * 8 * 3)
    third = sc.prune_(model, sc.Magnitude(), 0.5, where=EVERYTHING)
    assert sum(zeros(model, EVERYTHING).values()) == count(0.8, 16 * 16 + 8 * 8 * 3)  # nothing comes back
    kept_zeros = (
        f"{count(0.8, 448) - count(0.5, 448)} weights that the masks keep were zero before and still are."
    )
    assert kept_zeros in third.notes


# ------ the right weights


@pytest.mark.parametrize("allocation", [sc.uniform, sc.global_], ids=name_of)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_magnitude_removes_the_smallest_weights(allocation, sparsity):
    model = nn.Sequential(nn.Linear(9, 7), nn.Conv2d(3, 5, 3), nn.ConvTranspose1d(4, 6, 2), nn.Linear(2, 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = sc.prune_(model, sc.Magnitude(), sparsity, allocation=allocation)
    groups = [[t.name] for t in select(model).targets]
    for group in groups if allocation is sc.uniform else [list(itertools.chain(*groups))]:
        sizes = torch.cat([before[n].abs().view(-1) for n in group])
        kept = torch.cat([report.masks[n].view(-1) for n in group])
        assert sizes[kept].min() > sizes[~kept].max()
        assert abs(int((~kept).sum()) - sparsity * len(kept)) <= 1


def test_nothing_else_is_touched():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2)
    )
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model(torch.randn(3, 2, 4)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = bits(model)
    sc.prune_(model, sc.Magnitude(), 0.5)
    changed = {n for n, b in bits(model).items() if b != before[n]}
    assert changed == {"0.weight", "3.weight"}
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None)


def test_the_model_is_the_same_object_seen_through_wrappers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[0].weight
    sc.prune_(torch.compile(nn.DataParallel(model), backend="eager"), sc.Magnitude(), 0.5)
    assert model[0].weight is weight and int((weight == 0).sum()) == 8


# ------ every kind of module

MODULES = {
    "linear": (lambda: nn.Linear(8, 4), (3, 8)),
    "linear, one output": (lambda: nn.Linear(8, 1), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), (2, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(8, 4, 3, groups=2), (2, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "channels last": (lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), (2, 4, 6, 6)),
    "convT1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 6)),
    "convT2d": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), (2, 8, 6, 6)),
    "convT3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (2, 4, 3, 3, 3)),
    "hf conv1d": (lambda: Conv1D(4, 8), (3, 8)),
    "lstm": (lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True), (5, 2, 8)),
    "gru": (lambda: nn.GRU(8, 4), (5, 2, 8)),
    "rnn cell": (lambda: nn.RNNCell(8, 4), (2, 8)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "embedding": (lambda: nn.Embedding(12, 8), None),
    "layer norm": (lambda: nn.LayerNorm(8), (2, 8)),
}


@pytest.mark.parametrize("pattern", [sc.Unstructured(), sc.PerRow()], ids=repr)
@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module(kind, pattern):
    make, shape = MODULES[kind]
    model = randn_(make())
    where = sc.Where(also="*weight*")
    entries = sum(t.weight.numel() for t in select(model, where).targets)
    report = sc.prune_(model, sc.Magnitude(), 0.6, pattern=pattern, where=where)
    assert sum(zeros(model, where).values()) == report.removed == count(0.6, entries)
    report.masks.check(model)
    x = torch.arange(4) if shape is None else torch.randn(shape)
    output = model(x)
    assert torch.isfinite(output[0] if isinstance(output, tuple) else output).all()


def test_raw_parameters_of_any_shape_can_be_asked_for():
    model = nn.Module()
    for name, shape in {"scalar": (), "vector": (5,), "stack": (3, 4, 5), "experts": (2, 3, 4, 5)}.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    report = sc.prune_(model, sc.Magnitude(), 0.5, allocation=sc.global_, where=sc.Where(also="*"))
    assert sum(zeros(model, sc.Where(also="*")).values()) == report.removed == count(0.5, 1 + 5 + 60 + 120)


def test_tied_weights_are_pruned_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    report = sc.prune_(model, sc.Magnitude(), 0.5)
    assert [layer.name for layer in report.layers] == ["0.weight"]
    assert model[1].weight is model[0].weight and report.removed == int((model[1].weight == 0).sum()) == 8


# ------ rounds and unusual criteria


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=name_of)
def test_rounds_of_a_criterion_that_does_not_change_end_where_one_step_does(allocation):
    model = model_of([(16, 16), (8, 8, 3), (4, 8)], torch.float32, "normal", 2)
    twin = copy.deepcopy(model)
    once = sc.prune_(model, sc.Magnitude(), 0.85, allocation=allocation, where=EVERYTHING)
    many = sc.prune_(twin, sc.Magnitude(), 0.85, allocation=allocation, where=EVERYTHING, rounds=7)
    assert many.removed == once.removed
    if allocation is sc.global_:
        assert many.masks == once.masks
    assert many.settings["rounds"] == "7"


@dataclass(frozen=True)
class Recording:
    """Magnitude; notes how many weights of each layer live each time that it is asked."""

    seen: list[int]
    needs = ()
    rounds = 4

    def __call__(self, weight, stats):
        self.seen.append(int((weight != 0).sum()))
        return weight.abs().float()


def test_the_density_of_rounds_falls_geometrically_and_the_last_is_exact():
    model = nn.Linear(100, 100)
    criterion = Recording([])
    report = sc.prune_(model, criterion, 0.9)
    assert criterion.seen == [10_000 - count(1 - 0.1 ** (i / 4), 10_000) for i in range(4)]
    assert report.removed == int((model.weight == 0).sum()) == 9_000


def test_synflow_reads_a_generator_of_batches_in_every_round():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    how = dict(allocation=sc.global_, rounds=5)
    report = sc.prune_(model, sc.SynFlow(), 0.9, batches=(x for x in [torch.ones(2, 6)]), **how)
    same = sc.prune_(twin, sc.SynFlow(), 0.9, batches=[torch.ones(2, 6)], **how)
    assert report.masks == same.masks
    assert report.removed == count(0.9, 6 * 8 + 8 * 8)


@dataclass(frozen=True)
class Itself:
    """Scores that are the live weight itself, not a copy of it."""

    needs = ()
    rounds = 1

    def __call__(self, weight, stats):
        return weight


def test_scores_that_are_the_weight_itself_do_not_damage_it():
    model = nn.Linear(4, 2, bias=False)
    weight = torch.tensor([[0.0, -1.0, 2.0, 0.0], [0.0, -4.0, 5.0, 6.0]])
    model.weight.data = weight.clone()
    sc.prune_(model, Itself(), 0.25)
    assert torch.equal(model.weight, weight)  # one zero is kept, as a zero
    sc.prune_(model, Itself(), 0.5)
    assert model.weight.tolist() == [[0.0, -1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 6.0]]


@dataclass(frozen=True)
class Forbidding:
    """Minus infinity: these go first."""

    needs = ()
    rounds = 1

    def __call__(self, weight, stats):
        return weight.abs().float().masked_fill(weight > 0, -torch.inf)


def test_scores_of_minus_infinity_go_first():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[9.0, -0.1, -0.2, 8.0]])
    sc.prune_(model, Forbidding(), 0.5)
    assert model.weight.tolist() == [[0.0, pytest.approx(-0.1), pytest.approx(-0.2), 0.0]]


@pytest.mark.parametrize(
    "criterion", [sc.Wanda(), sc.Taylor(), sc.OBD(), sc.SNIP(), sc.GraSP(), sc.RIA()], ids=repr
)
@pytest.mark.parametrize("pattern", [sc.Unstructured(), sc.PerRow(), sc.NM(2, 4), sc.Block(2, 2)], ids=repr)
def test_criteria_with_statistics_combine_with_every_pattern(criterion, pattern):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 4))
    batches = [(torch.randn(6, 4, 4, 4), torch.randint(0, 4, (6,))) for _ in range(2)]
    report = sc.prune_(model, criterion, 0.5, pattern=pattern, batches=batches, loss=F.cross_entropy)
    assert sum(zeros(model).values()) == report.removed == (8 * 36 + 8 * 32) // 2


def test_statistics_collected_earlier_give_the_same_masks():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [torch.randn(5, 6)]
    collected = sc.collect(model, sc.Wanda().needs, batches)
    twin = copy.deepcopy(model)
    again = sc.prune_(twin, sc.Wanda(), 0.5, stats=collected)
    assert again.masks == sc.prune_(model, sc.Wanda(), 0.5, batches=batches).masks
    with pytest.raises(SecateurError, match="Several rounds measure anew"):
        sc.prune_(model, sc.Wanda(), 0.5, stats=collected, rounds=2)


# ------ the report


def test_the_report_adds_up_and_is_plain_data(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10), nn.Linear(10, 2)
    )
    with torch.no_grad():
        model[4].weight[0, 0] = 0
    parameters = sum(p.numel() for p in model.parameters())
    zero_before = sum(int((p == 0).sum()) for p in model.parameters())
    pattern, x = sc.PerRow(), torch.randn(2, 3, 4, 4)
    report = sc.prune_(model, sc.Magnitude(norm=2), 0.25, pattern=pattern, allocation=sc.erk, example=x)
    zero_after = sum(int((p == 0).sum()) for p in model.parameters())

    assert [layer.name for layer in report.layers] == ["0.weight", "3.weight"]
    assert [layer.shape for layer in report.layers] == [(8, 3, 3, 3), (10, 32)]
    assert report.entries == 216 + 320
    assert report.removed == sum(layer.removed for layer in report.layers) == count(0.25, 536)
    assert report.sparsity == report.masks.sparsity == report.removed / 536
    for layer in report.layers:
        assert layer.sparsity == layer.removed / layer.entries == report.masks.by_layer()[layer.name]
        assert layer.zeros == layer.removed == zeros(model)[layer.name]
        assert layer.asked == pytest.approx(layer.sparsity)
    assert report.skipped == (("4.weight", "part of the output head"),)
    assert report.before.parameters == report.after.parameters == parameters
    assert (report.before.nonzero, report.after.nonzero) == (
        parameters - zero_before,
        parameters - zero_after,
    )
    assert (
        report.before.macs == report.after.macs and report.after.effective_macs < report.before.effective_macs
    )
    assert report.settings["criterion"] == "Magnitude(norm=2)" and report.settings["allocation"] == "erk"

    assert json.loads(json.dumps(report.to_dict())) == report.to_dict() | {
        "layers": [d | {"shape": list(d["shape"])} for d in report.to_dict()["layers"]]
    }
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["removed"] == report.removed


def test_the_printed_report_holds_the_table():
    model = nn.ModuleDict({"encoder": nn.Linear(40, 50), "head": nn.Linear(50, 2)})
    text = str(sc.prune_(model, sc.Magnitude(), 0.5))
    rows = [line.split() for line in text.splitlines()]
    (layer,) = (row for row in rows if row and row[0].startswith("encoder"))
    assert {"50", "x", "40", "2,000", "1,000", "50.00%"} <= set(layer)
    (total,) = (row for row in rows if row[:2] == ["1", "layers"])
    assert {"2,000", "1,000", "50.00%"} <= set(total)
    assert "do not get smaller or faster" in " ".join(text.split())


def test_an_emptied_layer_is_remarked():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[0].weight.data.mul_(1e-6)
    report = sc.prune_(model, sc.Magnitude(), 0.5, allocation=sc.global_, where=EVERYTHING)
    assert "0.weight has no weight left: nothing passes through this layer any more." in report.notes
    assert zeros(model, EVERYTHING) == {"0.weight": 16, "1.weight": 0}


# ------ on a real network


@pytest.mark.realdata("fashion_mnist")
def test_half_of_lenet_300_100_can_go():
    realdata = pytest.importorskip("benchmarks.realdata", exc_type=ImportError)
    model = realdata.lenet300()
    images, labels = realdata.fashion_mnist("test")
    dense = realdata.accuracy(model, images, labels)
    for allocation in (sc.uniform, sc.global_, sc.lamp):
        pruned = copy.deepcopy(model)
        report = sc.prune_(pruned, sc.Magnitude(), 0.5, allocation=allocation)
        assert [layer.name for layer in report.layers] == ["fc1.weight", "fc2.weight"]
        assert (
            int((pruned.fc1.weight == 0).sum() + (pruned.fc2.weight == 0).sum())
            == (784 * 300 + 300 * 100) // 2
        )
        assert realdata.accuracy(pruned, images, labels) > dense - 0.01
    random = copy.deepcopy(model)
    sc.prune_(random, sc.Random(), 0.5)
    assert realdata.accuracy(random, images, labels) < dense - 0.01  # what is removed matters
