import dataclasses
import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur import ArtifactError, Magnitude, MaskError, Masks, prune_
from secateur.artifacts import load, load_hf, save


class ResNet(nn.Module):
    """A residual block that is used twice, BatchNorm buffers, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.register_buffer("scale", torch.tensor([0.5]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.block(x)
        x = x + self.block(x)
        return self.fc(x.mean((2, 3))) * self.scale


class Tied(nn.Module):
    """A weight under two names, and a whole module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.second = self.first
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(x))))


class Odd(nn.Module):
    """Every dtype, and values and shapes that are easily lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        self.bhalf = nn.Parameter(torch.randn(3, 3).bfloat16())
        self.register_buffer("special", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
        self.register_buffer("count", torch.tensor(2**53 + 1))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("eight", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("wide", torch.randn(4, dtype=torch.float64))


def bits(model: nn.Module) -> dict[str, tuple[object, ...]]:
    return {
        name: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def trained(make: type[nn.Module]) -> nn.Module:
    """A model whose BatchNorm statistics are not the initial ones."""
    model = make()
    if make is ResNet:
        model(torch.randn(4, 3, 6, 6))
    elif make is Tied:
        model(torch.randint(11, (9,)))
    return model


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "secateur.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sign_again(folder: Path) -> None:
    """Make the manifest agree with changed files, as whoever forges an artifact would."""
    files = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in folder.iterdir()
        if p.name != "secateur.json"
    }
    edit(folder, files=files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of a pruned network, with masks and report."""
    model = trained(ResNet)
    save(model, tmp_path / "out", report=prune_(model, Magnitude(), 0.5))
    return tmp_path / "out"


@pytest.mark.parametrize("make", [ResNet, Tied, Odd])
def test_every_value_comes_back_to_the_bit(make, tmp_path):
    model, fresh = trained(make), make()
    with torch.no_grad():
        for t in fresh.parameters():
            t.add_(1)
    parameters = [id(p) for p in fresh.parameters()]
    save(model, tmp_path / "out")
    assert load(tmp_path / "out", fresh) is fresh
    assert bits(fresh) == bits(model)
    assert [id(p) for p in fresh.parameters()] == parameters
    assert fresh.training


@pytest.mark.parametrize(("make", "shape"), [(ResNet, (2, 3, 6, 6)), (Tied, (7,))])
def test_outputs_are_identical(make, shape, tmp_path):
    model, fresh = trained(make).eval(), make().eval()
    x = torch.randn(shape) if make is ResNet else torch.randint(11, shape)
    save(model, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", fresh)(x), model(x))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    model = trained(Tied)
    save(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == {"embed.weight", "head.bias", *(n for n in model.state_dict() if n.startswith("first."))}
    tied = json.loads((tmp_path / "secateur.json").read_text())["tied"]
    assert ["embed.weight", "head.weight"] in tied and ["first.0.bias", "second.0.bias"] in tied
    fresh = load(tmp_path, Tied())
    assert fresh.head.weight is fresh.embed.weight and fresh.first is fresh.second


def test_weights_tied_by_their_data_alone_are_tied(tmp_path):
    model, fresh = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for m in (model, fresh):
        m[1].weight.data = m[0].weight.data
    save(model, tmp_path)
    assert "1.weight" not in load_file(tmp_path / "model.safetensors")
    assert bits(load(tmp_path, fresh)) == bits(model)


def test_a_loaded_model_does_not_depend_on_its_file(folder):
    model = load(folder, ResNet())
    before = bits(model)
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as f:
        f.write(b"\x3f" * size)
    assert bits(model) == before


def test_saved_dtypes_replace_those_of_the_given_model(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    weight = fresh[0].weight
    assert bits(load(tmp_path, fresh)) == bits(model)
    assert fresh[0].weight is weight and weight.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_wrappers_are_looked_through(tmp_path):
    model = ResNet()
    save(nn.DataParallel(model), tmp_path)
    wrapped = torch.compile(ResNet())
    assert load(tmp_path, wrapped) is wrapped
    assert bits(wrapped._orig_mod) == bits(model)


class Versioned(nn.Linear):
    """Reads the version of its layout from the state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_are_told_the_version_of_their_layout(tmp_path):
    model, fresh = Versioned(3, 2), Versioned(3, 2)
    save(model, tmp_path / "m")
    load(tmp_path / "m", fresh)
    assert torch.equal(fresh.weight, model.weight)


def test_masks_and_report_lie_beside_the_model(tmp_path):
    model = trained(ResNet)
    report = prune_(model, Magnitude(), 0.75)
    save(model, tmp_path, report=report)
    assert Masks.load(tmp_path / "masks.safetensors") == report.masks
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert json.loads((tmp_path / "secateur.json").read_text())["settings"] == report.settings

    save(model, tmp_path, masks=report.masks)
    assert Masks.load(tmp_path / "masks.safetensors") == report.masks
    assert sorted(tree(tmp_path)) == ["masks.safetensors", "model.safetensors", "secateur.json"]

    save(model, tmp_path)
    assert sorted(tree(tmp_path)) == ["model.safetensors", "secateur.json"]


def test_masks_that_the_model_breaks_are_not_saved(tmp_path):
    model = ResNet()
    masks = prune_(model, Magnitude(), 0.5).masks
    with torch.no_grad():
        model.stem.weight.fill_(1)
    with pytest.raises(MaskError, match=r"stem\.weight are not zero"):
        save(model, tmp_path / "out", masks=masks)
    assert not (tmp_path / "out").exists()


def test_the_manifest_tells_the_truth(folder):
    manifest = json.loads((folder / "secateur.json").read_text())
    assert (manifest["format"], manifest["kind"]) == (1, "module")
    assert manifest["class"] == f"{ResNet.__module__}.ResNet"
    written = tree(folder)
    del written["secateur.json"]
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in written.items()
    }
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~umask}


def test_tokenizer_files_of_the_source_are_copied_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    copied = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model"]
    copied += ["preprocessor_config.json", "chat_template.jinja", "special_tokens_map.json"]
    for name in [*copied, "config.json", "pytorch_model.bin", "model.safetensors", "code.py", "README.md"]:
        (source / name).write_text(name)
    model = ResNet()
    save(model, tmp_path / "out", source=source)
    assert {n: b for n, b in tree(tmp_path / "out").items() if n in copied} == {n: n.encode() for n in copied}
    assert tree(tmp_path / "out").keys() - copied == {"model.safetensors", "secateur.json"}
    with pytest.raises(ArtifactError, match="is no folder"):
        save(model, tmp_path / "out", source=tmp_path / "nowhere")


# --- where to write, and what a failure leaves


def test_what_is_not_an_artifact_is_never_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty and holds no secateur\.json"):
        save(ResNet(), tmp_path)
    with pytest.raises(ArtifactError, match="is a file"):
        save(ResNet(), tmp_path / "notes.txt")
    assert tree(tmp_path) == {"notes.txt": b"mine"}


def test_an_earlier_artifact_is_replaced_and_other_files_stay(folder):
    (folder / "notes.txt").write_text("mine")
    model = trained(Tied)
    save(model, folder)
    assert sorted(tree(folder)) == ["model.safetensors", "notes.txt", "secateur.json"]
    assert bits(load(folder, Tied())) == bits(model)


def test_a_failed_save_changes_nothing(folder, tmp_path):
    before = tree(folder)
    model = ResNet()
    model.register_buffer("bad", torch.zeros(2, dtype=torch.complex128))  # safetensors has no such dtype
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ArtifactError, match="complex128"):
            save(model, target)
    assert tree(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert list(folder.rglob(".*")) == []


def test_a_failure_at_any_rename_leaves_the_earlier_artifact(folder, monkeypatch):
    """Faults injected at the first, second, ... rename until one save goes through."""
    before, rename = tree(folder), os.replace
    model = trained(ResNet)
    masks = prune_(model, Magnitude(), 0.25).masks
    for allowed in range(100):
        calls = iter(range(1000))

        def failing(a, b, allowed=allowed, calls=calls):
            if next(calls) == allowed:
                raise OSError("injected")
            rename(a, b)

        monkeypatch.setattr(os, "replace", failing)
        try:
            save(model, folder, masks=masks)
        except OSError:
            monkeypatch.setattr(os, "replace", rename)
            assert tree(folder) == before
            load(folder, ResNet())
        else:
            break
    # Two files are first written under temporary names; four leave, three arrive.
    assert allowed == 2 + 4 + 3
    assert bits(load(folder, ResNet())) == bits(model)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda m: m.add_module("lazy", nn.LazyLinear(3)), r"lazy\.weight has no values"),
        (lambda m: m.add_module("meta", nn.Linear(2, 2, device="meta")), r"meta\.weight has no values"),
        (lambda m: m.register_buffer("sparse", torch.eye(3).to_sparse()), "sparse is not dense"),
        (lambda m: m.add_module("extra", Extra()), "extra state"),
        (lambda m: overlap(m), "cannot be saved"),
    ],
)
def test_states_that_safetensors_cannot_hold_are_refused(break_, message, tmp_path):
    model = ResNet()
    break_(model)
    with pytest.raises(ArtifactError, match=message):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Extra(nn.Module):
    def get_extra_state(self) -> object:
        return {"any": "object"}


def overlap(model: nn.Module) -> None:
    line = torch.arange(5.0)
    model.register_buffer("a", line[:3])
    model.register_buffer("b", line[1:])


# --- damaged and foreign folders


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "report.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "empty", "longer", "flipped"])
def test_damage_to_any_file_is_found_and_named(folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        at = random.Random(name).randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes(
            {"shorter": data[:-1], "empty": b"", "longer": data + b"x", "flipped": flipped}[damage]
        )
    model = ResNet()
    before = bits(model)
    said = {"missing": "is missing", "longer": "was changed", "flipped": "is corrupt"}.get(
        damage, "was cut short"
    )
    with pytest.raises(ArtifactError, match=f"{name} {said}"):
        load(folder, model)
    assert bits(model) == before


SHA = "0" * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "update Secateur"),
        ({"format": True}, "no known format"),
        ({"format": "1"}, "no known format"),
        ({"format": None}, "no known format"),
        ({"kind": "pickle"}, "'kind'"),
        ({"kind": ["hf"]}, "'kind'"),
        ({"class": 3}, "'class'"),
        ({"files": []}, "'files'"),
        ({"files": {"model.safetensors": None}}, "'files'"),
        ({"files": {"model.safetensors": {"sha256": SHA, "bytes": 1.5}}}, "'files'"),
        ({"files": {"model.safetensors": {"sha256": None, "bytes": 1}}}, "'files'"),
        ({"files": {"../../etc/passwd": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"/etc/passwd": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"..": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"a\\b": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"C:b": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"a\0b": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"secateur.json": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"n" * 300: {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {"\ud800": {"sha256": SHA, "bytes": 1}}}, "refused"),
        ({"files": {}}, "not listed"),
        ({"tied": {}}, "'tied'"),
        ({"tied": [["fc.weight"]]}, "'tied'"),
        ({"tied": [["fc.weight", 3]]}, "'tied'"),
        ({"tied": [["fc.weight", "a"], ["a", "b"]]}, "'tied'"),
        ({"tied": [["absent", "also.absent"]]}, "does not hold"),
        ({"tied": [["fc.weight", "fc.bias"]]}, "does not hold"),
        ({"dtypes": {"*": "_dynamo"}}, "'dtypes'"),
        ({"dtypes": {"*": "int64"}}, "'dtypes'"),
        ({"dtypes": {"fc.weight": "float32"}}, "'dtypes'"),
        ({"settings": {"criterion": {}}}, "'settings'"),
    ],
)
def test_a_hostile_manifest_is_refused(folder, changes, message):
    edit(folder, **changes)
    model = ResNet()
    before = bits(model)
    with pytest.raises(ArtifactError, match=message):
        load(folder, model)
    assert bits(model) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format":' + b"1" * 5000 + b"}", b"null"],
)
def test_what_is_no_json_object_is_refused(folder, content):
    (folder / "secateur.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"secateur\.json"):
        load(folder, ResNet())
    with pytest.raises(ArtifactError, match=r"secateur\.json"):
        save(ResNet(), folder)


def test_a_huge_manifest_is_not_read(folder):
    os.truncate(folder / "secateur.json", 2**40)  # sparse: takes no space
    with pytest.raises(ArtifactError, match="bytes, too many"):
        load(folder, ResNet())


def test_forged_files_with_right_hashes_are_refused(folder):
    model = ResNet()
    before = bits(model)
    sound = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}

    save_file(sound | {"stem.weight": torch.ones(8, 3, 3, 3)}, folder / "model.safetensors")
    sign_again(folder)
    with pytest.raises(MaskError, match=r"stem\.weight"):
        load(folder, model)

    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    sign_again(folder)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not a sound safetensors file"):
        load(folder, model)

    save_file(sound, folder / "model.safetensors")
    (folder / "masks.safetensors").write_bytes(b"")
    sign_again(folder)
    with pytest.raises(ArtifactError, match=r"masks\.safetensors"):
        load(folder, model)
    assert bits(model) == before


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["pytorch_model.bin", "config.json"]])
def test_pickles_are_refused_unopened(files, tmp_path):
    for name in files:
        (tmp_path / name).write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "burst")))
    said = "only as a pickle" if "config.json" in files else "holds no model"
    for call in (load, load_hf):
        with pytest.raises(ArtifactError, match=said if call is load or "config.json" in files else "config"):
            call(tmp_path)
    assert not (tmp_path / "burst").exists()


def test_a_folder_without_a_model_is_one_clear_sentence(tmp_path):
    with pytest.raises(ArtifactError, match=r"^[^\n]* holds no model: neither Secateur's [^\n]*\.$"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match=r"^There is no folder [^\n]*nowhere\.$"):
        load(tmp_path / "nowhere")


# --- models that do not fit


def other_shape() -> nn.Module:
    model = ResNet()
    model.fc = nn.Linear(8, 6)
    return model


def lacking() -> nn.Module:
    model = ResNet()
    del model.norm
    return model


def extended() -> nn.Module:
    model = ResNet()
    model.more = nn.Linear(2, 2)
    return model


def integer() -> nn.Module:
    model = ResNet()
    model.norm.running_mean = torch.zeros(8, dtype=torch.int64)
    return model


def lazy() -> nn.Module:
    model = ResNet()
    model.fc = nn.LazyLinear(5)
    return model


def add_one(module: nn.Module, _: object) -> None:
    module.bias.data.add_(1)


def late_failure() -> nn.Module:
    """Fits by names and shapes, but a hook changes what is loaded, after the other weights were."""
    model = ResNet().bfloat16()
    model.fc.register_load_state_dict_post_hook(add_one)
    return model


def retied() -> nn.Module:
    model = ResNet()
    model.block[1].weight = model.norm.weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_shape, r"fc\.weight is \(5, 8\) in it and \(6, 8\)"),
        (lacking, r"it holds norm\.bias, norm\.num_batches_tracked, norm\.running_mean and 2 more, which"),
        (extended, r"it lacks more\.bias, more\.weight, which ResNet has"),
        (integer, r"norm\.running_mean is torch\.float32 in it and torch\.int64"),
        (lazy, r"fc\.\w+ of the given ResNet is lazy"),
        (late_failure, r"ResNet changes fc\.bias"),
        (retied, r"block\.1\.weight, norm\.weight are one tensor in the model but not in"),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(folder, make, message):
    model = make()
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if not nn.parameter.is_lazy(t)}
    before = {n: (t, t.data_ptr(), t.dtype, t.detach().clone()) for n, t in state.items()}
    with pytest.raises(ArtifactError, match=message):
        load(folder, model)
    after = model.state_dict(keep_vars=True)
    for name, (t, pointer, dtype, values) in before.items():
        assert after[name] is t and t.data_ptr() == pointer and t.dtype == dtype
        assert torch.equal(t, values)


def test_a_model_that_is_not_tied_as_the_saved_one_is_refused(tmp_path):
    save(Tied(), tmp_path)
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(11, 6))
    with pytest.raises(
        ArtifactError, match=r"embed\.weight, head\.weight are one tensor in .* not in the model"
    ):
        load(tmp_path, model)
    assert not model.head.weight.any()


def test_a_plain_module_needs_a_model_to_load_into(folder):
    with pytest.raises(ArtifactError, match=r"ResNet, not its code.*load\(folder, model\)"):
        load(folder)
    with pytest.raises(ArtifactError, match="not its code"):
        load_hf(folder)


def test_an_artifact_can_be_moved(folder, tmp_path):
    folder.rename(tmp_path / "elsewhere")
    assert bits(load(tmp_path / "elsewhere", ResNet()))["fc.bias"]


def test_a_report_may_cover_a_copy_without_masks_argument(tmp_path):
    """Masks given beside a report are the ones that are saved."""
    model = trained(ResNet)
    report = prune_(model, Magnitude(), 0.5)
    tighter = Masks({n: m & (m.cumsum(0) < 3) for n, m in report.masks.items()})
    tighter.apply_(model)
    save(model, tmp_path, report=dataclasses.replace(report), masks=tighter)
    assert Masks.load(tmp_path / "masks.safetensors") == tighter != report.masks
