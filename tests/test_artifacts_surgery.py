import copy
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur import ArtifactError, Magnitude, prune_
from secateur.artifacts import load, save
from secateur.artifacts.hf_cut import build
from secateur.artifacts.steps import as_steps, later_name
from secateur.budget import Budget
from secateur.graph import Graph, Group
from secateur.layers import drop_layers_
from secateur.shrink import shrink_
from secateur.surgery import Cuts, Surgery

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZE, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(24).view(2, 12) * 5 % 64

# Models in a file of their own, which a fresh process imports; the second version has another size in a call.
CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Convolutions with batch normalisation, a residual branch, a flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
                                   nn.Conv2d(12, 8, 3, padding=1))
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.adaptive_avg_pool2d(x + self.block(x), 2)
        return self.fc(x.flatten(1))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Rigid(nn.Module):
    """A size that stands in the code of a call."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        B, L, _ = x.shape
        return self.down(torch.relu(self.up(x)).view(B, L, 16))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))
'''

# Run by a fresh interpreter: what the user of a folder does, without the pruning script.
LOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
import models_in_file, secateur as sc
torch.set_num_threads(1)
results = {}
for name, cls in json.loads(sys.argv[2]).items():
    case = load_file(root / f"{name}.safetensors")
    model = sc.load(root / name, getattr(models_in_file, cls)().eval()) if cls else sc.load(root / name)
    with torch.no_grad():
        y = model(case["x"].clone())  # other alignment in memory, other rounding
    results[name] = bool(torch.equal(y if cls else y[0], case["y"]))
print(json.dumps(results))
"""

# Without Secateur.
PLAIN = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
root = Path(sys.argv[1])
torch.set_num_threads(1)
results = {}
for name in json.loads(sys.argv[2]):
    case = load_file(root / f"{name}.safetensors")
    try:
        model = transformers.AutoModel.from_pretrained(root / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(root / name)
        with torch.no_grad():
            results[name] = bool(torch.equal(model(case["x"].clone())[0], case["y"]))
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
assert "secateur" not in sys.modules
print(json.dumps(results))
"""


def llama(**changes: Any) -> Any:
    config = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens)).eval()


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, max_position_embeddings=16)).eval()


def cut(model: nn.Module, x: Tensor, keep: Callable[[Group], Any]) -> Cuts:
    """Cut a model; `keep` says what stays of a group, None for all."""
    graph = Graph.trace(model, x)
    kept = {group: keep(group) for group in graph.groups()}
    return Surgery({g: k for g, k in kept.items() if k is not None}).apply_().cuts


def half_of(*kinds: str, where: str = "") -> Callable[[Group], Any]:
    return lambda g: range(1, g.size, 2) if g.kind in kinds and where in g.name else None


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        n: (t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, t in model.state_dict().items()
    }


def settings(model: nn.Module) -> dict[str, Any]:
    """Classes and plain attributes of all modules, and which objects the parameters are."""
    found: dict[str, Any] = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | list)}
        found[f"{name}."] = (type(module), plain)
    return found


def answer(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return (y if isinstance(y, Tensor) else y[0]).contiguous()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sign_again(folder: Path) -> None:
    """Make the manifest agree with changed files, as whoever forges an artifact would."""
    paths = [p for p in folder.iterdir() if p.name != "secateur.json"]
    files = {
        p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in paths
    }
    edit(folder / "secateur.json", files=files)


def run(program: str, *args: str) -> Any:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def import_models(folder: Path, name: str = "models_in_file") -> ModuleType:
    (folder / f"{name}.py").write_text(CODE)
    sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    yield import_models(tmp_path_factory.mktemp("models"))
    sys.modules.pop("models_in_file", None)


IMAGE, SEQUENCE = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, models: ModuleType) -> tuple[Path, dict[str, Any]]:
    """Folders of all sorts of small models, each with an input and the answer; and the models."""
    root = tmp_path_factory.mktemp("saved")
    (root / "models_in_file.py").write_text(CODE)
    small: dict[str, Any] = {}

    def keep(name: str, model: Any, x: Tensor, *surgery: Any, **options: Any) -> None:
        small[name] = model
        save(model, root / name, surgery=surgery or None, **options)
        save_file({"x": x, "y": answer(model, x)}, root / f"{name}.safetensors")

    model = llama()
    keep("uniform", model, IDS, cut(model, IDS, half_of("kv_groups", "neurons", "width")))
    model = llama()
    keep("per layer", model, IDS, cut(model, IDS, half_of("kv_groups", "neurons", where="layers.1")))
    model = llama()
    keep("head_dim", model, IDS, cut(model, IDS, half_of("head_dim")))
    model = transformers.AutoModelForCausalLM.from_config(llama().config, dtype=torch.bfloat16).eval()
    keep("bfloat16", model, IDS, cut(model, IDS, half_of("neurons", where="layers.0")))
    model = llama(tie_word_embeddings=False)
    steps = [cut(model, IDS, half_of("neurons", where="layers.1")), drop_layers_(model, [0], IDS)]
    steps.append(cut(model, IDS, half_of("kv_groups", where="layers.0")))
    keep("cut and dropped", model, IDS, *steps)
    model = llama()
    keep("dropped", model, IDS, drop_layers_(model, [1], IDS))
    model = gpt2()
    keep("gpt2", model, IDS, cut(model, IDS, half_of("heads", "neurons", where="h.1")))
    model = bert()
    keep("bert", model, IDS, cut(model, IDS, half_of("heads")))

    model = models.Net().train()
    model(IMAGE)
    report = shrink_(model.eval(), IMAGE, Budget.macs(0.5))
    keep("net", model, IMAGE, report=report)
    model = models.Attend().eval()
    keep("attend", model, SEQUENCE, cut(model, SEQUENCE, half_of("heads", "width")))
    model = models.Rigid().eval()
    keep("rigid", model, SEQUENCE, cut(model, SEQUENCE, half_of("neurons")))
    model = models.Stack().eval()
    x = torch.randn(2, 5, 8)
    steps = [drop_layers_(model, [0, 2], x), cut(model, x, half_of("neurons"))]
    keep("stack", model, x, *steps)
    return root, small


CASES = {
    "uniform": "", "per layer": "", "head_dim": "", "bfloat16": "", "cut and dropped": "", "dropped": "",
    "gpt2": "", "bert": "", "net": "Net", "attend": "Attend", "rigid": "Rigid", "stack": "Stack",
}  # fmt: skip


# --- round trips


def test_a_fresh_process_loads_every_folder_without_the_pruning_script(saved):
    assert run(LOAD, str(saved[0]), json.dumps(CASES)) == dict.fromkeys(CASES, True)


def test_plain_transformers_loads_what_the_configuration_expresses_and_refuses_the_rest(saved):
    names = ["uniform", "dropped", "per layer", "head_dim", "cut and dropped", "gpt2"]
    results = run(PLAIN, str(saved[0]), json.dumps(names))
    assert [results[name] for name in names[:2]] == [True, True]
    for name in names[2:]:
        assert "no file named model.safetensors" in results[name], name


@pytest.mark.parametrize("name", CASES)
def test_every_value_comes_back_to_the_bit(name, saved, models):
    root, small = saved
    cls = CASES[name]
    loaded = load(root / name, getattr(models, cls)().eval() if cls else None)
    assert bits(loaded) == bits(small[name])
    ours, theirs = (dict(m.named_buffers()) for m in (loaded, small[name]))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    assert [type(m) for m in loaded.modules()] == [type(m) for m in small[name].modules()]
    files = {path.name for path in (root / name).iterdir()}
    expressed = name in ("uniform", "dropped")
    assert ("pruned.safetensors" in files) == (not cls and not expressed)
    assert (
        "surgery.json" in files
        and "surgery.json" in json.loads((root / name / "secateur.json").read_text())["files"]
    )


def test_a_built_model_is_in_evaluation_mode_with_its_ties_and_settings(saved):
    root, small = saved
    loaded: Any = load(root / "per layer")
    assert not loaded.training and all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(root / "per layer" / "pruned.safetensors")
    assert not hasattr(loaded.config, "secateur")
    assert loaded.model.layers[1].mlp.gate_proj.out_features == 24
    text = loaded.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(text, small["per layer"].generate(IDS[:1, :4], max_new_tokens=5, do_sample=False))


def test_rotary_frequencies_are_those_of_the_kept_dimensions(saved):
    dense = transformers.LlamaModel(llama().config).rotary_emb.inv_freq
    loaded: Any = load(saved[0] / "head_dim")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, dense[1::2])
    assert loaded.model.layers[0].self_attn.scaling == 8**-0.5


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model = llama()
    save(model, tmp_path, surgery=[cut(model, IDS, half_of("neurons", where="layers.1"))])
    loaded = load(tmp_path)
    path = tmp_path / "pruned.safetensors"
    with open(path, "r+b") as f:
        f.write(b"\x3f" * path.stat().st_size)
    assert bits(loaded) == bits(model)


def test_dense_weights_are_never_made():
    """All parameters that the constructor registers are without values, whatever it does to them."""
    built = build(transformers.GPT2LMHeadModel, gpt2().config, "auto")
    assert all(p.is_meta for p in built.parameters()) and not any(b.is_meta for b in built.buffers())
    assert built.lm_head.weight is built.transformer.wte.weight
    assert not nn.Linear(2, 2).weight.is_meta


def test_saving_changes_nothing_of_the_model(tmp_path):
    model = llama()
    cuts = cut(model, IDS, half_of("kv_groups", "neurons", where="layers.1"))
    uniform = llama()
    both = [cut(uniform, IDS, half_of("kv_groups", "neurons")), drop_layers_(uniform, [0], IDS)]
    both.append(cut(uniform, IDS, half_of("neurons", where="layers.0")))
    for m, steps in ((model, [cuts]), (uniform, both)):
        config, before = copy.deepcopy(vars(m.config)), settings(m)
        save(m, tmp_path / str(len(steps)), surgery=steps)
        assert vars(m.config).keys() == config.keys() and m.config.to_dict() == type(m.config).from_dict(
            m.config.to_dict()
        ).to_dict() | {"_name_or_path": m.config.name_or_path}
        assert settings(m) == before
    written = json.loads((tmp_path / "3" / "config.json").read_text())
    dense = llama().config.to_dict()
    assert {k: v for k, v in written.items() if k in SIZE} == SIZE
    assert (written["num_key_value_heads"], written["head_dim"]) == (2, dense["head_dim"])
    assert (uniform.config.num_key_value_heads, uniform.config.num_hidden_layers) == (1, 2)
    assert bits(load(tmp_path / "3")) == bits(uniform)


def test_a_report_is_written_without_the_surgery_which_has_its_file(saved):
    folder = saved[0] / "net"
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"]["kinds"] and "surgery" not in report
    assert json.loads((folder / "secateur.json").read_text())["settings"] == report["settings"]
    steps = json.loads((folder / "surgery.json").read_text())
    assert steps["format"] == 1 and [list(step) for step in steps["steps"]] == [["cuts"]]


def test_masks_go_with_a_surgery(tmp_path, models):
    model = models.Net().eval()
    report = shrink_(model, IMAGE, Budget.macs(0.6))
    pruned = prune_(model, Magnitude(), 0.5)
    save(model, tmp_path, report=pruned, surgery=report.cuts)
    fresh = models.Net().eval()
    assert bits(load(tmp_path, fresh)) == bits(model)
    assert (tmp_path / "masks.safetensors").exists()


def test_a_loaded_model_is_saved_again_with_the_surgery_of_its_folder(saved, tmp_path, models):
    root, _ = saved
    loaded: Any = load(root / "cut and dropped")
    with torch.no_grad():
        loaded.lm_head.weight.add_(1)
    with pytest.raises(ArtifactError, match="pass report= or surgery="):
        save(loaded, tmp_path / "a")
    for i, surgery in enumerate((root / "cut and dropped", root / "cut and dropped" / "surgery.json")):
        save(loaded, tmp_path / str(i), surgery=surgery)
        assert bits(load(tmp_path / str(i))) == bits(loaded)


def test_a_given_model_is_the_dense_one(saved, models):
    root, small = saved
    given = llama()
    assert load(root / "per layer", given) is given
    assert bits(given) == bits(small["per layer"])
    before = settings(given), bits(given)
    with pytest.raises(ArtifactError, match=r"must be as it was before: .* the model was cut before"):
        load(root / "per layer", given)
    assert (settings(given), bits(given)) == before
    # The configuration of this one describes the small model, so that is what is given.
    uniform = transformers.LlamaForCausalLM(small["uniform"].config)
    assert bits(load(root / "uniform", uniform)) == bits(small["uniform"])


def test_steps_that_change_nothing_are_left_out(tmp_path):
    model = llama()
    nothing = cut(model, IDS, lambda g: range(g.size) if g.kind == "neurons" else None)
    save(model, tmp_path, surgery=[nothing])
    assert not (tmp_path / "surgery.json").exists() and (tmp_path / "model.safetensors").exists()


# --- what save refuses


def test_a_pruned_model_without_its_surgery_is_refused(tmp_path):
    for keep in (half_of("neurons", where="layers.1"), half_of("head_dim"), half_of("queries")):
        model = llama()
        cuts = cut(model, IDS, keep)
        if not cuts.expressed:
            with pytest.raises(ArtifactError, match="pass report= or surgery= of its structured pruning"):
                save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_the_configuration_would_change_is_found(tmp_path):
    """Shapes alone do not tell that a model is not the one of its configuration."""
    model = llama()
    model.model.layers[2].self_attn.scaling = 0.5
    with pytest.raises(ArtifactError, match=r"layers\.2\.self_attn\.scaling is 0\.5 in the model but 0\.35"):
        save(model, tmp_path / "out")


def test_a_surgery_that_is_not_the_whole_one_is_refused(tmp_path, models):
    model = llama()
    first = cut(model, IDS, half_of("neurons", where="layers.1"))
    second = cut(model, IDS, half_of("neurons", where="layers.1"))
    third = cut(model, IDS, half_of("neurons", where="layers.2"))
    for surgery, message in [
        ([first], "give all steps"),
        ([second, third], r"layers\.1\.mlp.* is |does not fit"),
        ([first, second], "give all steps"),
        ([first, third, second, first], "do not follow one another"),
        ([third, second, first], "do not follow one another"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            save(model, tmp_path / "out", surgery=surgery)
    net = models.Net()
    with pytest.raises(ArtifactError, match="is missing in the model"):
        save(net, tmp_path / "out", surgery=[first])
    assert not (tmp_path / "out").exists()
    save(model, tmp_path / "out", surgery=[first, second, third])
    assert bits(load(tmp_path / "out")) == bits(model)


def test_a_field_that_was_changed_since_is_not_overwritten(tmp_path):
    model = llama()
    steps = [cut(model, IDS, half_of("kv_groups", "neurons")), drop_layers_(model, [0], IDS)]
    steps.append(cut(model, IDS, half_of("neurons", where="layers.0")))
    model.config.num_hidden_layers = 7
    with pytest.raises(ArtifactError, match="num_hidden_layers of the configuration is 7, and not 2"):
        save(model, tmp_path / "out", surgery=steps)
    assert model.config.num_hidden_layers == 7


# --- what load refuses


NUMBERS = itertools.count()


@pytest.fixture
def rigid(tmp_path: Path) -> Iterator[ModuleType]:
    """A module of its own for each test: edits of calls stay in force in a process."""
    name = f"rigid_in_file_{next(NUMBERS)}"
    yield import_models(tmp_path, name)
    del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, rigid: ModuleType) -> Path:
    model = rigid.Rigid().eval()
    graph = Graph.trace(model, SEQUENCE)
    [group] = graph.groups("neurons")
    applied = Surgery({group: range(8)}).apply_()
    save(model, tmp_path / "out", surgery=[applied.cuts])
    applied.undo()
    return tmp_path / "out"


def test_a_changed_surgery_is_found_by_its_hash(folder, rigid):
    path = folder / "surgery.json"
    path.write_text(path.read_text().replace('"size": 16', '"size": 17'))
    with pytest.raises(ArtifactError, match=r"surgery\.json is corrupt or was changed"):
        load(folder, rigid.Rigid())
    path.unlink()
    with pytest.raises(ArtifactError, match=r"surgery\.json is missing"):
        load(folder, rigid.Rigid())


def changed(data: Any, path: str, value: Any) -> None:
    """Set, append to or delete (None) an entry of nested data, reached by keys with dots between."""
    *way, last = path.split("/")
    for key in way:
        data = data[int(key) if isinstance(data, list) else key]
    key = int(last) if isinstance(data, list) else last
    if value is None:
        del data[key]
    else:
        data[key] = value


CUTS = "steps/0/cuts/"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "update Secateur"),
        ("format", True, "no surgery of a known format"),
        ("steps", {}, "no surgery of a known format"),
        ("steps/0", [], "neither cuts nor dropped"),
        ("steps/0", {"cuts": {}, "drop": {}}, "neither cuts nor dropped"),
        ("steps/0", {"cuts": {}}, "sizes of its axes"),
        ("steps/0", {"cuts": None}, "sizes of its axes"),
        ("steps/0", {"drop": None}, "record of dropped blocks is damaged"),
        (CUTS + "axes/a0/kept", [[0, 2**40]], "sizes of its axes"),
        (CUTS + "axes/a0/size", 2**40, "sizes of its axes"),
        (CUTS + "axes/a0/kept", [], "not sorted, or outside"),
        (CUTS + "axes/a0/size", 17, "(the cut of .* is not for|do not have its shape)"),
        (CUTS + "tensors/up.bias/dims", [], "(the cut of up.bias is not for|do not have its shape)"),
        (CUTS + "tensors/up.bias/dims", ["a9"], "names an axis 'a9'"),
        (CUTS + "tensors/up.bias/shape", [8], "(the cut of up.bias is not for|do not have its shape)"),
        (
            CUTS + "tensors/down.bias",
            {"shape": [3], "dims": ["a0"]},
            "(the cut of down.bias is not for|do not have its shape)",
        ),
        (CUTS + "tensors/other", {"shape": [16], "dims": ["a0"]}, "no other, which the surgery cuts"),
        (CUTS + "tensors/up.bias", None, "is \\(8,\\) in it and \\(16,\\)"),
        (CUTS + "scales", {"up.bias": [float("inf"), 0.0]}, "scale of up.bias is not finite"),
        (CUTS + "scales", {"nothing": [1.0, 0.0]}, "does not fit the Rigid"),
        (CUTS + "kept_scales", [["", "_secateur_scale_1", float("nan")]], "attention in the model is not"),
        (CUTS + "kept_scales", [["nothing", "_secateur_scale_1", 0.5]], "keeps a scale in nothing"),
        (CUTS + "kept_scales", [["", "forward", 0.5]], "no name for one"),
        (CUTS + "swaps", 3, "damaged"),
        (CUTS + "edits", [{"import": "os"}], "An edit of a call has the fields"),
        (CUTS + "edits/0/source", "0" * 64, "use the same version of rigid_in_file"),
        (CUTS + "edits/0/module", "models_elsewhere", "models_elsewhere"),
        (CUTS + "edits/0/dimension", "os.system", "as 'dimension', which it cannot be"),
        (CUTS + "edits/0/argument", 9, "does not fit the Rigid"),
        (
            CUTS + "attributes",
            [{"module": "", "steps": [], "name": "__class__", "index": None, "old": 1, "new": 2}],
            "no plain attribute",
        ),
        (
            CUTS + "attributes",
            [{"module": "", "steps": [], "name": "heads", "index": None, "old": 1, "new": 2}],
            "keeps no number heads",
        ),
    ],
)
def test_a_forged_surgery_is_refused_and_the_model_stays(path, value, message, folder, rigid):
    data = json.loads((folder / "surgery.json").read_text())
    changed(data, path, value)
    (folder / "surgery.json").write_text(json.dumps(data))
    sign_again(folder)
    fresh = rigid.Rigid().eval()
    before, code = (bits(fresh), settings(fresh)), rigid.Rigid.forward.__code__
    with pytest.raises(ArtifactError, match=message):
        load(folder, fresh)
    assert (bits(fresh), settings(fresh)) == before
    assert rigid.Rigid.forward.__code__ is code


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("changes/cuts", [3], "its cuts are not"),
        ("changes/cuts/0/stack", 3, "its cuts are not"),
        ("changes/cuts/0/kept", ["a", 0], "its cuts are not"),
        ("changes/cuts/0/kept", [0, 9], "keeps"),
        ("changes/cuts/0/length", 7, "has 4 blocks, not 7"),
        ("changes/edits/0/path", ["__class__"], "its edits are not"),
        ("changes/edits/0/path", [], "its edits are not"),
        ("changes/edits/0/path", "num_layers", "its edits are not"),
        ("changes/edits/0/new", {"a": 1}, "its edits are not"),
        ("changes/edits/0/old", 9, "not 9 as recorded"),
        ("changes/format", "x", "record of dropped blocks of this format"),
        ("notes", [3, None], ""),
        ("config_ok", "yes", "damaged"),
    ],
)
def test_a_forged_record_of_dropped_blocks_is_refused(path, value, message, tmp_path, models):
    model, x = models.Stack().eval(), torch.randn(2, 5, 8)
    save(model, tmp_path, surgery=[drop_layers_(model, [1], x)])
    data = json.loads((tmp_path / "surgery.json").read_text())
    changed(data["steps"][0]["drop"], path, value)
    (tmp_path / "surgery.json").write_text(json.dumps(data))
    sign_again(tmp_path)
    fresh = models.Stack().eval()
    before = bits(fresh), settings(fresh)
    if not message:
        assert bits(load(tmp_path, fresh)) == bits(model)
        return
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path, fresh)
    assert (bits(fresh), settings(fresh)) == before


def test_a_surgery_for_another_model_is_refused_and_the_model_stays(saved, models):
    root, _ = saved
    for name, other in [
        ("net", models.Rigid()),
        ("stack", models.Net()),
        ("rigid", models.Attend()),
        ("cut and dropped", llama(tie_word_embeddings=False, intermediate_size=40)),
        ("cut and dropped", llama(tie_word_embeddings=True)),
        ("attend", models.Net()),
    ]:
        before = bits(other), settings(other)
        with pytest.raises(ArtifactError):
            load(root / name, other)
        assert (bits(other), settings(other)) == before


def test_weights_that_do_not_fit_after_the_surgery_leave_the_model(tmp_path, models):
    """The last of three things that can go wrong: the surgery was done, and is taken back."""
    model = models.Attend().eval()
    save(model, tmp_path, surgery=[cut(model, SEQUENCE, half_of("heads"))])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["head.bias"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    sign_again(tmp_path)
    fresh = models.Attend().eval()
    before = bits(fresh), settings(fresh)
    with pytest.raises(ArtifactError, match=r"head\.bias is \(4,\) in it"):
        load(tmp_path, fresh)
    assert (bits(fresh), settings(fresh)) == before

    model = llama()
    out = tmp_path / "llama"
    save(model, out, surgery=[cut(model, IDS, half_of("neurons", where="layers.1"))])
    whole = load_file(out / "pruned.safetensors")
    for change, message in [
        ({"extra": torch.ones(1)}, "holds extra, which LlamaForCausalLM lacks"),
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight, which LlamaForCausalLM has"),
        ({"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight is \(3,\) in it and \(32,\)"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "torch.int64 in it"),
    ]:
        kept = {n: t for n, t in (whole | change).items() if t is not None}
        save_file(kept, out / "pruned.safetensors")
        sign_again(out)
        with pytest.raises(ArtifactError, match=message):
            load(out)


def test_files_that_were_not_listed_are_not_read(saved, tmp_path):
    model = llama()
    save(model, tmp_path, surgery=[cut(model, IDS, half_of("neurons", where="layers.1"))])
    files = json.loads((tmp_path / "secateur.json").read_text())["files"]
    for name in ("surgery.json", "config.json", "generation_config.json"):
        left = {n: f for n, f in files.items() if n != name}
        edit(tmp_path / "secateur.json", files=left)
        with pytest.raises(ArtifactError, match=f"{name} is not listed"):
            load(tmp_path)


def test_another_version_of_the_code_is_refused(folder, rigid, tmp_path):
    """The same names and shapes, and another text of the function that holds the edited call."""
    (tmp_path / f"{rigid.__name__}.py").write_text(CODE.replace("relu(self.up(x))", "tanh(self.up(x))"))
    program = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import secateur as sc
try:
    sc.load(sys.argv[2], importlib.import_module(sys.argv[3]).Rigid())
except sc.ArtifactError as error:
    print(json.dumps(str(error)))
"""
    said = run(program, str(tmp_path), str(folder), rigid.__name__)
    assert f"use the same version of {rigid.__name__}" in said


def test_a_failure_at_any_rename_leaves_the_earlier_artifact(folder, models, monkeypatch):
    before, rename = {p.name: p.read_bytes() for p in folder.iterdir()}, os.replace
    model = models.Net().eval()
    report = shrink_(model, IMAGE, Budget.macs(0.5))
    for allowed in range(100):
        calls = iter(range(1000))

        def failing(a: Any, b: Any, allowed: int = allowed, calls: Iterator[int] = calls) -> None:
            if next(calls) == allowed:
                raise OSError("injected")
            rename(a, b)

        monkeypatch.setattr(os, "replace", failing)
        try:
            save(model, folder, report=report)
        except OSError:
            monkeypatch.setattr(os, "replace", rename)
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        else:
            break
    # Three files are first written under temporary names; three leave, four arrive.
    assert allowed == 3 + 3 + 4
    assert bits(load(folder, models.Net().eval())) == bits(model)


KILLED = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
rename, left = os.replace, int(sys.argv[4])
def killing(a, b):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    rename(a, b)
from secateur.artifacts import load, save
model = load(sys.argv[2], importlib.import_module(sys.argv[3]).Rigid())
os.replace = killing
save(model, sys.argv[2], surgery=sys.argv[2])
"""


def test_a_kill_leaves_a_folder_that_loads_or_says_what_is_wrong(folder, tmp_path, rigid):
    """Killed at each rename: three temporary names, then three files out, and three in, the manifest last."""
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    expected = bits(load(folder, rigid.Rigid()))
    found = []
    for n in (0, 2, 4, 7):
        args = [str(tmp_path), str(folder), rigid.__name__, str(n)]
        assert subprocess.run([sys.executable, "-c", KILLED, *args], check=False).returncode == 9
        try:
            found.append(bits(load(folder, rigid.Rigid())) == expected)
        except ArtifactError:
            found.append(False)
        for name, data in whole.items():
            (folder / name).write_bytes(data)
    assert found == [True, True, False, False]


# --- names over dropped blocks


def test_names_follow_the_blocks_that_stay(models):
    model, x = models.Stack().eval(), torch.randn(2, 5, 8)
    record = drop_layers_(model, [0, 2], x)
    [step] = as_steps([record])
    assert [later_name(f"encoder.layers.{i}.linear1.weight", step) for i in range(4)] == [
        None, "encoder.layers.0.linear1.weight", None, "encoder.layers.1.linear1.weight",
    ]  # fmt: skip
    assert later_name("head.weight", step) == "head.weight"
    assert {later_name(old, step): old for old in record.origin.values()} == record.origin
