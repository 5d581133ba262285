"""Masks: their algebra, their files, and zeros that stay zero while a model trains."""

import copy
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.core.errors import ArtifactError, MaskError


@st.composite
def mask_pairs(draw, count: int = 3):
    """Masks over the same parameters: one, two, three of them."""
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3))
    out = []
    for _ in range(count):
        tensors = {}
        for i, shape in enumerate(shapes):
            bits = draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
            tensors[f"layer.{i}"] = torch.tensor(bits).view(shape)
        out.append(sc.Masks(tensors))
    return out


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)
    )


def halved(model: nn.Module) -> sc.Masks:
    """Masks that remove half of the model's two body layers; the model itself stays as it is."""
    return sc.prune_(copy.deepcopy(model), sc.Random(), 0.5).masks


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, dtype=torch.float32) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 2, 6, generator=g).to(dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw one by one": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
}


# ------ algebra


@given(mask_pairs())
def test_the_algebra_is_that_of_sets(masks):
    a, b, c = masks
    assert a & b == b & a and a | b == b | a
    assert (a & b) & c == a & (b & c) and (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert ~(a & b) == ~a | ~b and ~~a == a
    assert a - b == a & ~b and (a - b) & b == a & ~a
    assert a & b <= a <= a | b
    assert (a <= b) == ((a & b) == a)
    assert (a <= b and b <= a) == (a == b)
    assert (a | b).kept == a.kept + b.kept - (a & b).kept
    assert a.iou(b) == b.iou(a) == ((a & b).kept / (a | b).kept if (a | b).kept else 1.0)
    assert a.iou(a) == 1.0


@given(mask_pairs(1))
def test_fractions_are_those_of_the_bits(masks):
    (a,) = masks
    bits = torch.cat([m.reshape(-1) for m in a.values()])
    assert (a.entries, a.kept) == (len(bits), int(bits.sum()))
    assert a.sparsity == int((~bits).sum()) / len(bits)
    assert a.density == pytest.approx(a.kept / len(bits))
    assert (~a).sparsity == pytest.approx(a.density)
    assert a.by_layer() == {n: 1 - m.double().mean().item() for n, m in a.items()} or all(
        x == pytest.approx(1 - m.double().mean().item())
        for x, m in zip(a.by_layer().values(), a.values(), strict=True)
    )
    assert f"sparsity {a.sparsity:.4f}" in repr(a)


def test_masks_of_other_parameters_or_shapes_do_not_mix():
    a = sc.Masks({"x": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(MaskError, match="only one of them has y"):
        a & sc.Masks({"x": a["x"], "y": a["x"]})
    with pytest.raises(MaskError, match=r"masks of x differ in shape: \(2,\) and \(3,\)"):
        a | sc.Masks({"x": torch.ones(3, dtype=torch.bool)})
    assert a != sc.Masks({"x": torch.ones(3, dtype=torch.bool)})
    assert a != {"x": a["x"]}


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(2, dtype=torch.uint8)])
def test_masks_are_boolean_tensors(tensor):
    with pytest.raises(MaskError, match=r"mask of a\.b is not a boolean tensor"):
        sc.Masks({"a.b": tensor})


def test_masks_of_a_model_are_its_zeros():
    model = net()
    report = sc.prune_(model, sc.Magnitude(), 0.7)
    assert sc.Masks.of(model) == report.masks
    assert sc.Masks.of(net()).sparsity == 0
    assert list(sc.Masks.of(model, sc.Where(include="3"))) == ["3.weight"]


# ------ on a model


def test_apply_zeroes_what_is_not_kept_and_nothing_else():
    model = net()
    before = copy.deepcopy(model.state_dict())
    masks = halved(model)
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = math.nan  # a product with the mask would keep the NaN
    masks.apply_(model)
    for name, value in model.state_dict().items():
        kept = masks.get(name, torch.tensor(True))
        assert torch.equal(value, torch.where(kept, before[name], 0)), name
    masks.check(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_apply_in_every_type_and_memory_format(dtype, memory_format):
    model = nn.Conv2d(4, 6, 3).to(dtype).to(memory_format=memory_format)
    before = model.weight.detach().clone()
    mask = torch.rand(model.weight.shape) < 0.5
    sc.Masks({"weight": mask}).apply_(model)
    assert torch.equal(model.weight, torch.where(mask, before, 0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_hold_on_a_layer_of_many_chunks(dtype, memory_format):
    model = nn.Conv2d(64, 500, 3).to(dtype).to(memory_format=memory_format)
    before = model.weight.detach().clone()
    mask = torch.rand(model.weight.shape) < 0.5
    masks = sc.Masks({"weight": mask})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with masks.hold(model, optimizer):
        assert torch.equal(model.weight, torch.where(mask, before, 0))
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.zeros_like(model.bias)
        optimizer.step()
    assert torch.equal(model.weight, torch.where(mask, before - 1, 0))


def test_check_counts_what_should_be_zero():
    model = net()
    masks = halved(model)
    masks.apply_(model)
    masks.check(model)
    with torch.no_grad():
        gone = (~masks["3.weight"]).nonzero()
        model[3].weight[tuple(gone[0])] = 1e-30
        model[3].weight[tuple(gone[1])] = math.nan
    with pytest.raises(MaskError, match=r"2 weights of 3\.weight are not zero though its mask removes them"):
        masks.check(model)


@pytest.mark.parametrize("act", ["apply_", "check", "hold"])
def test_masks_that_do_not_fit_are_refused_before_anything_is_written(act):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    removing = torch.zeros(4, 2, 3, dtype=torch.bool)
    for other, says in (
        ({"7.weight": removing}, r"The model has no parameter 7\.weight"),
        ({"3.weight": removing}, r"3\.weight has shape \(6, 16\), its mask \(4, 2, 3\)"),
    ):
        masks = sc.Masks({"0.weight": removing, **other})
        with pytest.raises(MaskError, match=says):
            getattr(masks, act)(*((model, optimizer) if act == "hold" else (model,)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ------ held while training


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_held_zeros_survive_training_and_the_rest_trains(make):
    model = net()
    masks = halved(model)
    optimizer = make(model.parameters())
    with masks.hold(model, optimizer):
        masks.check(model)  # applied at once
        start = copy.deepcopy(model.state_dict())
        for _ in range(3):
            train(model, optimizer, steps=2)
            masks.check(model)
        assert all(p.grad.count_nonzero() == p.numel() for p in (model[0].weight, model[3].weight))  # dense
    for name, value in model.state_dict().items():
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert (value != start[name])[kept].all(), name


def test_training_without_holding_moves_the_zeros():
    model = net()
    masks = halved(model)
    masks.apply_(model)
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    with pytest.raises(MaskError, match="hold the masks on the optimizer"):
        masks.check(model)


def test_holding_is_training_with_a_projection_after_each_step():
    held, plain = net(), net()
    masks = halved(held)
    masks.apply_(plain)
    optimizers = [OPTIMIZERS["momentum and decay"](m.parameters()) for m in (held, plain)]
    with masks.hold(held, optimizers[0]):
        train(held, optimizers[0])
    x = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizers[1].zero_grad()
        plain(torch.randn(8, 2, 6, generator=x)).square().mean().backward()
        optimizers[1].step()
        for name, mask in masks.items():
            plain.get_parameter(name).data[~mask] = 0
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("as_context", [True, False])
def test_release_stops_holding(as_context):
    model = net()
    masks = halved(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    hold = masks.hold(model, optimizer)
    if as_context:
        with hold:
            train(model, optimizer)
    else:
        hold.release()
    masks.check(model)  # the weights stay as they were
    train(model, optimizer)
    with pytest.raises(MaskError):
        masks.check(model)


def test_the_hold_ends_when_training_fails():
    model = net()
    masks = halved(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ZeroDivisionError), masks.hold(model, optimizer):
        raise ZeroDivisionError
    train(model, optimizer)
    with pytest.raises(MaskError):
        masks.check(model)


def test_nan_at_a_masked_position_becomes_zero_at_the_next_step():
    model = net()
    masks = halved(model)
    optimizer = OPTIMIZERS["momentum and decay"](model.parameters())
    with masks.hold(model, optimizer):
        with torch.no_grad():
            model[3].weight[~masks["3.weight"]] = math.nan
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        masks.check(model)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_holding_on_the_optimizer_of_another_model_is_refused_and_changes_nothing():
    model, other = net(), net(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError, match="trains none of the masked parameters"):
        halved(model).hold(model, torch.optim.SGD(other.parameters(), lr=0.1))
    head_only = torch.optim.SGD(model[5].parameters(), lr=0.1)
    with pytest.raises(MaskError, match="trains none of the masked parameters"):
        halved(model).hold(model, head_only)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_a_parameter_that_was_replaced_is_still_held_and_one_that_is_gone_is_an_error():
    model = net()
    masks = halved(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with masks.hold(model, optimizer):
        model[3].weight = nn.Parameter(torch.ones(6, 16))
        train(model, optimizer, steps=1)
        masks.check(model)
        torch.nn.utils.parametrizations.weight_norm(model[3])
        with pytest.raises(MaskError, match="weight of ParametrizedLinear is no longer a parameter"):
            train(model, optimizer, steps=1)


def test_the_model_stays_plain():
    model = net()
    keys = list(model.state_dict())
    masks = halved(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with masks.hold(model, optimizer):
        train(model, optimizer)
        assert list(model.state_dict()) == keys
        assert not model._forward_hooks and not model._forward_pre_hooks
        assert all(type(p) is nn.Parameter for p in model.parameters())
        twin = copy.deepcopy(model)
        masks.check(twin)
        loaded = net(1)
        loaded.load_state_dict(model.state_dict())
        masks.check(loaded)
        # The copy trains on its own, with masks of its own.
        second = OPTIMIZERS["adamw"](twin.parameters())
        with masks.hold(twin, second):
            train(twin, second)
        masks.check(twin)
        masks.check(model)


def test_holding_through_saved_and_restored_optimizer_state():
    model = net()
    masks = halved(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with masks.hold(model, optimizer):
        train(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer)
        masks.check(model)


def test_bfloat16():
    model = net().bfloat16()
    masks = halved(model)
    optimizer = OPTIMIZERS["momentum and decay"](model.parameters())
    with masks.hold(model, optimizer):
        train(model, optimizer, dtype=torch.bfloat16)
        masks.check(model)


def working_backend() -> str:
    """The default one where there is a C++ compiler that works, else the one that only captures graphs."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except RuntimeError:
        return "aot_eager"
    return "inductor"


# Importing the default backend makes torch warn of its own use of TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_without_a_graph_break():
    backend = working_backend()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    masks = halved(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = OPTIMIZERS["adamw"](compiled.parameters())
    with masks.hold(compiled, optimizer):
        train(compiled, optimizer)
        masks.check(compiled)
        masks.check(model)
        x = torch.randn(8, 2, 6)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_tied_weight_is_held_under_either_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    masks = sc.Masks({"1.weight": torch.eye(4, dtype=torch.bool)})
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with masks.hold(model, optimizer):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight != 0, torch.eye(4, dtype=torch.bool))


# ------ files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(masks=mask_pairs(1))
def test_saved_and_loaded_masks_are_the_same(masks, tmp_path):
    masks[0].save(tmp_path / "masks.safetensors")
    loaded = sc.Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks[0]
    assert list(loaded) == list(masks[0])
    assert [m.shape for m in loaded.values()] == [m.shape for m in masks[0].values()]


def test_empty_masks_are_saved_too(tmp_path):
    sc.Masks({}).save(tmp_path / "none")
    assert sc.Masks.load(tmp_path / "none") == sc.Masks({})
    empty = sc.Masks({"a": torch.ones(0, 3, dtype=torch.bool)})
    empty.save(tmp_path / "folder" / "empty")
    assert sc.Masks.load(tmp_path / "folder" / "empty")["a"].shape == (0, 3)


def test_a_file_takes_one_bit_a_weight_and_nothing_beside_it(tmp_path):
    masks = sc.Masks({f"layers.{i}.weight": torch.rand(512, 500) < 0.5 for i in range(4)})
    masks.save(tmp_path / "masks")
    size = (tmp_path / "masks").stat().st_size
    assert 0 <= size - masks.entries // 8 < 1000
    assert [p.name for p in tmp_path.iterdir()] == ["masks"]


def test_a_failed_save_leaves_nothing_half_written(tmp_path):
    (tmp_path / "masks").mkdir()  # a folder is in the way
    with pytest.raises(OSError):
        sc.Masks({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "masks")
    assert [p.name for p in tmp_path.rglob("*")] == ["masks"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("stored") / "masks"
    g = torch.Generator().manual_seed(0)
    sc.Masks({n: torch.rand(5, 7, generator=g) < 0.5 for n in ("first", "second")}).save(path)
    return path.read_bytes()


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ArtifactError, match="There is no mask file"):
            sc.Masks.load(path)


def test_a_truncated_file_at_any_length(tmp_path, stored):
    for length in range(0, len(stored), 3):
        (tmp_path / "masks").write_bytes(stored[:length])
        with pytest.raises(ArtifactError, match="masks"):
            sc.Masks.load(tmp_path / "masks")


def test_a_flipped_bit_anywhere(tmp_path, stored):
    original = tmp_path / "original"
    original.write_bytes(stored)
    expected = sc.Masks.load(original)
    for position in range(len(stored)):
        for bit in (position % 8, (position + 3) % 8):
            damaged = bytearray(stored)
            damaged[position] ^= 1 << bit
            (tmp_path / "masks").write_bytes(damaged)
            try:
                loaded = sc.Masks.load(tmp_path / "masks")
            except ArtifactError:
                continue
            assert loaded == expected, f"bit {bit} of byte {position} is not noticed"


def test_files_of_others(tmp_path):
    path = tmp_path / "file"
    path.write_text("not a safetensors file, but a text that is long enough to hold a header")
    with pytest.raises(ArtifactError, match="not a safetensors file, or a damaged one"):
        sc.Masks.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ArtifactError, match="not a mask file of this format"):
        sc.Masks.load(path)
    save_file({"weight": torch.ones(3).bfloat16()}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="not a mask file of this format"):
        sc.Masks.load(path)
    save_file(
        {"w": torch.ones(3)}, path, metadata={"format": "secateur-masks-1", "shapes": json.dumps({"w": [3]})}
    )
    with pytest.raises(ArtifactError, match="do not match their checksum"):
        sc.Masks.load(path)


def test_a_file_holds_plain_tensors_that_anyone_can_read(tmp_path):
    mask = torch.tensor([[True, False, True], [True, True, False]])
    sc.Masks({"w": mask}).save(tmp_path / "masks")
    bits = load_file(tmp_path / "masks")["w"]
    assert bits.tolist() == [0b10111000]
