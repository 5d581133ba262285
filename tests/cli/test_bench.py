"""`secateur bench`."""

import json

import pytest
import torch

import secateur as sc

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **SIZES)).eval()
    report = sc.prune_(model, sc.Magnitude(), 0.6)
    sc.save(model, tmp_path / "pruned", report=report, compressed=True)
    return tmp_path / "pruned"


def test_a_language_model(folder, tmp_path, run, capsys):
    options = ["--prompt", 4, "--new", 2, "--runs", 1, "--threads", torch.get_num_threads()]
    assert run("bench", folder, *options, "--out", tmp_path / "b.json") == 0
    text = capsys.readouterr().out
    assert "prompt of 4 tokens" in text
    assert "layers are sparse" in text
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["compressed"]["layers"]) == 15
    assert [r["tokens"] for r in found["measured"]["rows"]] == [4, 1]


def test_the_sparse_model_is_saved(folder, tmp_path, run, capsys):
    options = ["--prompt", 4, "--new", 2, "--runs", 1, "--dtype", "int8", "--no-measure"]
    assert run("bench", folder, *options, "--save", tmp_path / "fast") == 0
    assert f"The sparse model is in {tmp_path / 'fast'}" in " ".join(capsys.readouterr().out.split())
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run("bench", folder, "--save", folder) == 1
    assert "is the model's own folder: choose another" in " ".join(capsys.readouterr().err.split())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept
    fast = sc.load(tmp_path / "fast")
    layers = [m for m in fast.modules() if isinstance(m, sc.runtime.SparseLinear)]
    assert {m.packed.values.dtype for m in layers} == {torch.int8}
    for command in ("bench", "inspect"):
        assert run(command, tmp_path / "fast") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "holds a model with sparse layers: give the dense one" in said
    text = tmp_path / "text.txt"
    text.write_text("what is read one block at a time needs weights that transformers finds")
    options = ["--method", "alps", "--sparsity", 0.5, "--data", text, "--out", tmp_path / "no"]
    assert run("prune", tmp_path / "fast", *options) == 1
    assert "pruned.safetensors, which secateur.load alone opens" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dtype", "int4"], "--dtype is one of float32, bfloat16, int8"),
        (["--tokens", "many"], "--tokens are numbers such as 1,64"),
        (["--tokens", "0"], "whole numbers from 1 on"),
        (["--memory", "-1"], "a fraction of the dense weights"),
        (["--runs", "0"], "at least 1"),
    ],
)
def test_bad_options(folder, run, capsys, options, complaint):
    assert run("bench", folder, *options) == 1
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_a_model_that_writes_no_text(tmp_path, run, capsys):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    sc.save(transformers.BertModel(config).eval(), tmp_path / "bert")
    assert run("bench", tmp_path / "bert") == 1
    assert "writes no text: give it examples, --data FILE" in " ".join(capsys.readouterr().err.split())
