import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur import ArtifactError, Magnitude, MaskError, Masks, prune_
from secateur.artifacts import load, load_hf, save

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZE, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(24).view(2, 12) * 5 % 64


def llama(**changes: Any) -> Any:
    config = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, max_position_embeddings=16))


def vit() -> Any:
    config = transformers.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=7)
    return transformers.ViTForImageClassification(config)


def mixtral() -> Any:
    """Its experts are fused in memory and apart in the file."""
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


MODELS = {
    "llama": (llama, "AutoModelForCausalLM", IDS, "text-generation"),
    "gpt2": (gpt2, "AutoModelForCausalLM", IDS, "text-generation"),
    "bert": (bert, "AutoModelForMaskedLM", IDS, "fill-mask"),
    "vit": (vit, "AutoModelForImageClassification", torch.randn(2, 3, 16, 16), "image-classification"),
    "mixtral": (mixtral, "AutoModelForCausalLM", IDS, "text-generation"),
}

# Run by a fresh interpreter without Secateur: what anyone would do with the folders.
PLAIN = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
torch.set_num_threads(1)
results = {}
for name, auto in json.loads(sys.argv[1]).items():
    folder = Path(sys.argv[2]) / name
    case = load_file(folder.with_suffix(".safetensors"))
    model = getattr(transformers, auto).from_pretrained(folder, torch_dtype="auto")
    with torch.no_grad():
        results[name] = [bool(torch.equal(model(case["x"])[0], case["y"])), type(model).__name__]
    if (folder / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        results[name].append(tokenizer("Once upon a time")["input_ids"])
assert "secateur" not in sys.modules
print(json.dumps(results))
"""


def bits(model: nn.Module) -> dict[str, tuple[object, bytes]]:
    return {
        n: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in model.state_dict().items()
    }


def answer(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)[0].contiguous()


def saved_with_answer(model: Any, x: Tensor, folder: Path, **options: Any) -> None:
    save(model, folder, **options)
    save_file({"x": x, "y": answer(model, x)}, folder.with_suffix(".safetensors"))


def plainly_loaded(cases: dict[str, str], root: Path) -> dict[str, list[Any]]:
    """What plain `from_pretrained` makes of folders, each with the class that loads it."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(cases), str(root)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder that transformers wrote, of a tied Llama."""
    llama().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def edit(folder: Path, name: str = "config.json", **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): t for k, t in changes.items()}
    kept = {name: t.clone() for name, t in tensors.items() if t is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# --- round trips


def test_plain_transformers_gives_identical_outputs(tmp_path):
    for name, (make, _, x, _) in MODELS.items():
        model = make().eval()
        saved_with_answer(model, x, tmp_path / name, report=prune_(model, Magnitude(), 0.5))
    results = plainly_loaded({name: auto for name, (_, auto, _, _) in MODELS.items()}, tmp_path)
    assert [results[name][0] for name in MODELS] == [True] * len(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_load_gives_the_same_model_and_its_task(name, tmp_path, capfd):
    make, _, x, task = MODELS[name]
    model = make().eval()
    report = prune_(model, Magnitude(), 0.5)
    config = model.config.to_dict()
    save(model, tmp_path, report=report)
    assert model.config.to_dict() == config
    loaded = load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert bits(loaded) == bits(model)
    assert torch.equal(answer(loaded, x), answer(model, x))
    assert Masks.load(tmp_path / "masks.safetensors") == report.masks

    opened, found = load_hf(tmp_path)
    assert found == task and bits(opened) == bits(model)
    assert capfd.readouterr() == ("", "")


def test_ties_survive(tmp_path):
    model = llama()
    save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "secateur.json").read_text())["tied"] == [
        ["model.embed_tokens.weight", "lm_head.weight"]
    ]
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_comes_back_to_the_bit(dtype, tmp_path):
    model = llama().to(dtype)
    save(model, tmp_path)
    assert bits(load(tmp_path)) == bits(model)
    assert bits(load(tmp_path, llama())) == bits(model)


def test_mixed_dtypes_come_back_to_the_bit(tmp_path):
    """transformers itself would make them all one type, and lose digits of the norms."""
    model = llama().bfloat16()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
            nn.init.normal_(module.weight)
    save(model, tmp_path)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    assert bits(load(tmp_path)) == bits(model)
    assert not load_hf(tmp_path)[0].model.norm.weight.eq(model.model.norm.weight.bfloat16()).all()


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    model = llama()
    save(model, tmp_path)
    loaded, opened = load(tmp_path), load_hf(tmp_path)[0]
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.write(b"\x3f" * (tmp_path / "model.safetensors").stat().st_size)
    assert bits(loaded) == bits(opened) == bits(model)


def test_generation_settings_are_kept(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path)
    assert load(tmp_path).generation_config.max_new_tokens == 7


def test_settings_without_a_number_in_json_come_back(tmp_path):
    """The limit of Mamba-2's time step is infinite, which config.json holds as an object."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8}
    config = transformers.Mamba2Config(**sizes, expand=2, n_groups=1, vocab_size=64)
    model = transformers.Mamba2ForCausalLM(config).eval()
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS[:, :8]).logits, model(IDS[:, :8]).logits)


def test_load_into_a_given_model(tmp_path):
    model, fresh = llama(), llama()
    save(model, tmp_path, report=prune_(model, Magnitude(), 0.5))
    head = fresh.lm_head.weight
    assert load(tmp_path, fresh) is fresh and fresh.training
    assert bits(fresh) == bits(model)
    assert fresh.lm_head.weight is head is fresh.model.embed_tokens.weight

    wrong = llama(intermediate_size=56)
    before = bits(wrong)
    with pytest.raises(ArtifactError, match=r"mlp.down_proj.weight is \(32, 48\) in it and \(32, 56\)"):
        load(tmp_path, wrong)
    assert bits(wrong) == before


class Classifier(transformers.LlamaPreTrainedModel):
    """A class of the user's: transformers does not know it, and its constructor takes more."""

    def __init__(self, config: Any, classes: int = 3) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, classes)
        self.post_init()


def test_a_class_of_the_user_loads_into_a_given_model(tmp_path):
    model = Classifier(llama().config)
    save(model, tmp_path)
    assert bits(load(tmp_path, Classifier(llama().config))) == bits(model)
    with pytest.raises(ArtifactError, match="architecture 'Classifier', which transformers"):
        load(tmp_path)


def test_shards_are_loaded_and_checked(tmp_path):
    model = llama()
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        load(tmp_path)
    (tmp_path / "secateur.json").unlink()
    assert bits(load(tmp_path)) == bits(model)
    assert bits(load_hf(tmp_path)[0]) == bits(model)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-.* is missing"):
        load_hf(tmp_path)


@pytest.mark.realdata("minilm_l6", "stories260k")
def test_real_models_and_their_tokenizers(tmp_path, data_root, capfd):
    cases = {"minilm_l6": "AutoModel", "stories260k": "AutoModelForCausalLM"}
    ids = {}
    for name, task in (("minilm_l6", "feature-extraction"), ("stories260k", "text-generation")):
        source = data_root / name
        model, found = load_hf(source)
        assert found == task
        tokens = transformers.AutoTokenizer.from_pretrained(source)("Once upon a time", return_tensors="pt")
        x = tokens["input_ids"]
        ids[name] = x[0].tolist()
        report = prune_(model, Magnitude(), 0.3)
        saved_with_answer(model, x, tmp_path / name, report=report, source=source)
        assert bits(load(tmp_path / name)) == bits(model)
    assert capfd.readouterr() == ("", "")
    results = plainly_loaded(cases, tmp_path)
    assert results == {
        "minilm_l6": [True, "BertModel", ids["minilm_l6"]],
        "stories260k": [True, "LlamaForCausalLM", ids["stories260k"]],
    }
    assert load_hf(data_root / "minilm_l6")[0].dtype == torch.float16


# --- what save refuses


def test_a_model_that_its_configuration_cannot_express_is_refused(tmp_path):
    narrow = llama()
    mlp = narrow.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
    untied = llama()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() + 1)
    tied = llama()
    tied.model.layers[0].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    for model, message in [
        (narrow, r"layers\.1\.mlp\.down_proj\.bias is \(32,\) in the model but missing by its configuration"),
        (
            untied,
            r"lm_head\.weight, model\.embed_tokens\.weight are tied in the model or by its configuration",
        ),
        (tied, r"layers\.0\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight are tied"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_transformers_refuses_are_an_artifact_error(tmp_path):
    save(llama(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = llama()
    model.generation_config.temperature = 0.5  # without sampling: its save_pretrained raises
    model.generation_config.do_sample = False
    with pytest.raises(ArtifactError, match="transformers cannot save LlamaForCausalLM"):
        save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_adapters_and_quantized_models_are_not_saved(tmp_path):
    model = llama()
    model._hf_peft_config_loaded = True
    with pytest.raises(ArtifactError, match="adapters"):
        save(model, tmp_path / "out")
    model = llama()
    model.hf_quantizer = object()
    with pytest.raises(ArtifactError, match="quantized"):
        save(model, tmp_path / "out")


# --- what load refuses


def sign_again(folder: Path) -> None:
    """Make the manifest agree with changed files, as whoever forges an artifact would."""
    paths = [p for p in folder.iterdir() if p.name != "secateur.json"]
    files = {p.name: {"sha256": sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size} for p in paths}
    edit(folder, "secateur.json", files=files)


@pytest.mark.parametrize(
    ("forge", "error", "message"),
    [
        (lambda f: change_weights(f, model__norm__weight=None), ArtifactError, r"lack model\.norm\.weight"),
        (
            lambda f: change_weights(f, extra=torch.ones(2)),
            ArtifactError,
            "holds extra, which LlamaForCausalLM",
        ),
        (lambda f: edit(f, tie_word_embeddings=False), ArtifactError, r"lack lm_head\.weight"),
        (lambda f: edit(f, "secateur.json", tied=[]), ArtifactError, "tensor in the model but not in"),
        (lambda f: edit(f, architectures=["GPT2LMHeadModel"]), ArtifactError, "model_type 'llama'"),
        (
            lambda f: change_weights(f, model__layers__0__mlp__up_proj__weight=torch.ones(48, 32)),
            MaskError,
            r"layers\.0\.mlp\.up_proj\.weight are not zero",
        ),
    ],
)
def test_forged_artifacts_are_refused(forge, error, message, tmp_path):
    folder = tmp_path / "out"
    model = llama()
    save(model, folder, report=prune_(model, Magnitude(), 0.5))
    forge(folder)
    sign_again(folder)
    given = llama()
    before = bits(given)
    for target in (None, given):
        with pytest.raises(error, match=message):
            load(folder, target)
    assert bits(given) == before


def test_files_that_were_not_listed_are_not_read(tmp_path):
    save(bert(), tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"generation_config\.json is not listed"):
        load(tmp_path)


def test_damage_is_found_before_transformers_sees_it(tmp_path):
    save(llama(), tmp_path)
    edit(tmp_path, vocab_size=10**6)
    with pytest.raises(ArtifactError, match=r"config\.json was cut short"):
        load(tmp_path)


def remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def index(weight_map: object) -> Any:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "There is no folder .* a Hugging Face model folder holds"),
        (remove("config.json"), r"has no config\.json: a Hugging Face model folder holds"),
        (remove("model.safetensors"), "has no weights: a Hugging Face model folder holds"),
        (pickled, r"only as a pickle \(pytorch_model\.bin\)"),
        (write("model.safetensors", b""), r"model\.safetensors is not a sound safetensors file"),
        (write("model.safetensors", b"\x08" + bytes(20)), r"model\.safetensors is not a sound"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), r"model\.safetensors is not a sound"),
        (write("config.json", b"{"), r"config\.json is not valid JSON"),
        (write("config.json", b"[]"), r"config\.json does not hold a JSON object"),
        (write("config.json", b'{"a":' * 50_000), r"config\.json is nested too deeply"),
        (write("generation_config.json", b"{"), r"generation_config\.json is not valid JSON"),
        (write("adapter_config.json", b"{}"), "holds an adapter"),
        (lambda f: edit(f, architectures=["NovelForCausalLM"]), "architecture 'NovelForCausalLM'"),
        (lambda f: edit(f, architectures=["os"]), "architecture 'os'"),
        (lambda f: edit(f, architectures=["__class__"]), "architecture '__class__'"),
        (lambda f: edit(f, architectures=["pipeline"]), "architecture 'pipeline'"),
        (lambda f: edit(f, architectures=["LlamaConfig"]), "architecture 'LlamaConfig'"),
        (lambda f: edit(f, architectures=["PreTrainedModel"]), "architecture 'PreTrainedModel'"),
        (lambda f: edit(f, architectures=[]), "does not name the model's class"),
        (lambda f: edit(f, architectures="LlamaForCausalLM"), "does not name the model's class"),
        (lambda f: edit(f, architectures=[None]), "does not name the model's class"),
        (lambda f: edit(f, model_type="gpt2"), "has model_type 'gpt2', but LlamaForCausalLM is 'llama'"),
        (lambda f: edit(f, model_type={"a": 1}), "has model_type"),
        (lambda f: edit(f, hidden_size="wide"), "transformers cannot open"),
        (lambda f: edit(f, hidden_size=-4), "transformers cannot open"),
        (lambda f: edit(f, num_attention_heads=0), "transformers cannot open"),
        (lambda f: edit(f, dtype="float3", torch_dtype="float3"), "transformers cannot open"),
        (
            lambda f: edit(f, intermediate_size=40),
            r"do not belong together: .*\(32, 48\) in the weights and \(32, 40\)",
        ),
        (
            lambda f: edit(f, num_hidden_layers=3),
            r"lack model\.layers\.2\..* and \d+ more, which LlamaForCausalLM",
        ),
        (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "is quantized"),
        (lambda f: change_weights(f, model__norm__weight=None), r"lack model\.norm\.weight, which Llama"),
        (index({"x": "../model.safetensors"}), "refused"),
        (index({"x": "weights.bin"}), "refused"),
        (index({"x": "absent.safetensors"}), r"absent\.safetensors is missing"),
        (index({"x": 3}), "no valid weight_map"),
        (index([]), "no valid weight_map"),
        (twice, "which another shard holds too"),
    ],
)
def test_load_hf_says_what_is_wrong_with_a_folder(small, change, message, capfd):
    change(small)
    with pytest.raises(ArtifactError, match=message):
        load_hf(small)
    assert capfd.readouterr() == ("", "")


def test_load_hf_needs_transformers(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # what Python does for a package it may not find
    with pytest.raises(ArtifactError, match=r"pip install secateur\[hf\]"):
        load_hf(small)


def test_tensors_that_the_model_does_not_use_are_warned_of(small):
    expected = load_hf(small)[0]
    change_weights(small, extra=torch.ones(2))
    with pytest.warns(UserWarning, match="LlamaForCausalLM does not use extra in"):
        model, _ = load_hf(small)
    assert bits(model) == bits(expected)
    with pytest.warns(UserWarning, match="does not use extra"):
        load(small)


def test_a_plain_folder_loads_into_a_given_model(small):
    given = llama()
    assert bits(load(small, given)) == bits(load_hf(small)[0])


def test_a_choice_of_kernels_in_a_file_is_ignored(small):
    edit(small, attn_implementation="someone/kernels", _attn_implementation="someone/kernels")
    model, _ = load_hf(small)
    assert "/" not in model.config._attn_implementation
    assert torch.isfinite(answer(model, IDS)).all()


def test_messages_and_progress_bars_of_transformers_come_back(small):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_hf(small)
    edit(small, hidden_size=-4)
    with pytest.raises(ArtifactError):
        load_hf(small)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_task_of_an_uncommon_class_is_other(tmp_path):
    config = transformers.BertConfig(**TEXT, max_position_embeddings=16)
    transformers.BertForNextSentencePrediction(config).save_pretrained(tmp_path)
    assert load_hf(tmp_path)[1] == "other"


def test_importing_artifacts_does_not_import_transformers():
    program = "import sys, secateur.artifacts; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
