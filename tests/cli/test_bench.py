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


def test_the_sparse_model_is_saved(tmp_path, run, capsys, compiled):
    folder, sizes = tmp_path / "pruned", {"hidden_size": 512, "intermediate_size": 2048}  # large: sparse wins
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=4, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    sc.prune_(model, sc.Magnitude(), 0.95)
    sc.save(model, folder)
    options = ["--prompt", 4, "--new", 2, "--runs", 1, "--dtype", "int8"]
    assert run("bench", folder, *options, "--save", tmp_path / "fast") == 0
    assert f"The sparse model is in {tmp_path / 'fast'}" in " ".join(capsys.readouterr().out.split())
    fast = sc.load(tmp_path / "fast")
    layers = [m for m in fast.modules() if isinstance(m, sc.runtime.SparseLinear)]
    assert {m.packed.values.dtype for m in layers} == {torch.int8}
    assert run("bench", tmp_path / "fast") == 1
    assert "holds a model with sparse layers: give the dense one" in " ".join(capsys.readouterr().err.split())


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
