"""`prune_checkpoint`: the same as in memory, for whatever has blocks; refusals; nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur as sc
from benchmarks import zoo
from secateur.core.errors import ArtifactError, NonFiniteError, PatternError, StatsError, StreamError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations

ARCHITECTURES = (
    "llama",
    "opt",
    "bloom",
    "gptj",
    "gpt_neox",
    "gpt2",
    "qwen2",
    "gpt_oss",
    "mixtral",
    "deepseek_v3",
    "mamba",
    "t5",
    "bert",
    "vit",
)


def saved(name: str, folder: Path, **options: Any) -> list[dict[str, Tensor]]:
    """A model of the zoo in a folder; its inputs."""
    model, args, kwargs = zoo.build(f"transformers/{name}")
    assert not args
    model.save_pretrained(folder, **options)
    return [kwargs]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_result_is_that_of_pruning_in_memory(name: str, tmp_path: Path) -> None:
    batches = saved(name, tmp_path / "dense", max_shard_size="200KB")
    report = sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", sc.SparseGPT(), 0.5, batches=batches)
    model = sc.load_hf(tmp_path / "dense")[0]
    where = sc.Where(include=tuple(layer.name for layer in report.layers))
    whole = sc.prune_(model, sc.SparseGPT(), 0.5, batches=batches, where=where)
    stored = sc.load(tmp_path / "out").state_dict()
    assert report.removed == whole.removed > 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(stored[key], value, rtol=1e-3, atol=1e-5, msg=key)
    masks = sc.Masks.load(tmp_path / "out" / "masks.safetensors")
    assert masks.sparsity == pytest.approx(report.sparsity)
    for layer in report.layers:
        assert int((stored[layer.name] == 0).sum()) == layer.zeros >= layer.removed
        assert layer.removed == int((~masks[layer.name]).sum())
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / layer.entries + 1e-9)


@pytest.mark.parametrize(
    ("solver", "pattern", "allocation"),
    [
        (sc.ALPS(), sc.NM(2, 4), sc.uniform),
        (sc.Wanda(), sc.PerRow(), sc.uniform),
        (sc.SparseGPT(), sc.Unstructured(), sc.owl),
    ],
    ids=["alps 2:4", "wanda", "owl"],
)
def test_every_solver_pattern_and_allocation(
    solver: Any, pattern: sc.Pattern, allocation: Any, tmp_path: Path
) -> None:
    batches = saved("llama", tmp_path / "dense")
    given = {"pattern": pattern, "allocation": allocation, "batches": batches}
    report = sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", solver, 0.5, **given)
    model = sc.load_hf(tmp_path / "dense")[0]
    in_memory = sc.Select(solver, steps=0) if isinstance(solver, sc.Wanda) else solver
    whole = sc.prune_(model, in_memory, 0.5, **given)
    assert [layer.removed for layer in report.layers] == [layer.removed for layer in whole.layers]
    stored = sc.load(tmp_path / "out").state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(stored[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_pruned_folder_generates_with_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    batches = saved("llama", tmp_path / "dense", max_shard_size="100KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="50KB")
    report = sc.prune_checkpoint(tmp_path / "half", tmp_path / "out", sc.ALPS(), 0.6, batches=batches)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.dtype == torch.bfloat16
    text = pruned.generate(batches[0]["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
    assert text.shape[1] > 4
    for layer in report.layers:
        zeros = int((pruned.get_parameter(layer.name) == 0).sum())
        assert zeros >= round(0.6 * layer.entries)
    # What was not pruned is as it was, to the bit.
    before, after = model.state_dict(), pruned.state_dict()
    left = before.keys() - {layer.name for layer in report.layers}
    assert left and all(torch.equal(before[k], after[k]) for k in left)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["removed"] == report.removed


def test_hidden_states_beyond_the_limit_are_read_from_files(tmp_path: Path) -> None:
    batches = saved("llama", tmp_path / "dense")
    batches = [*batches, {k: v.flip(0) for k, v in batches[0].items()}]
    for name, spill in (("memory", 1 << 30), ("files", 0)):
        sc.prune_checkpoint(
            tmp_path / "dense", tmp_path / name, sc.SparseGPT(), 0.5, batches=batches, spill=spill
        )
    assert _same_weights(tmp_path / "memory", tmp_path / "files")
    assert not (tmp_path / "files" / ".secateur-run").exists()


class Stop(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("reconstruct", [None, sc.Reconstruct(epochs=1)], ids=["solved", "reconstructed"])
def test_an_interrupted_run_goes_on_with_the_same_result(
    reconstruct: sc.Reconstruct | None, tmp_path: Path
) -> None:
    batches = saved("llama", tmp_path / "dense")
    given = {"batches": batches, "reconstruct": reconstruct}
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "whole", sc.SparseGPT(), 0.5, **given)

    class Dying:
        """SparseGPT that fails in its nth call."""

        damping = 0.01

        def __init__(self, calls: int) -> None:
            self.left = calls

        def __call__(self, *args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Stop
            return sc.SparseGPT()(*args)

        def __repr__(self) -> str:
            return repr(sc.SparseGPT())

    tries = 0
    while True:
        tries += 1
        try:
            sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", Dying(10), 0.5, **given)
            break
        except Stop:
            assert not (tmp_path / "out" / "model.safetensors").exists()
    assert tries > 1
    assert _same_weights(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(Stop):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "other", Dying(0), 0.5, **given)
    with pytest.raises(ArtifactError, match="unfinished run with other settings"):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "other", sc.SparseGPT(), 0.6, **given)


def _same_weights(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names == sorted(p.name for p in b.glob("*.safetensors"))
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[dict[str, Tensor]]]:
    return tmp_path / "dense", saved("llama", tmp_path / "dense", max_shard_size="100KB")


def refused(folder: Path, out: Path, error: type[Exception], match: str, **given: Any) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}
    settings = {"solver": sc.SparseGPT(), "sparsity": 0.5} | given
    with pytest.raises(error, match=match):
        sc.prune_checkpoint(folder, out, settings.pop("solver"), settings.pop("sparsity"), **settings)
    assert not out.exists() or not [p for p in out.iterdir() if not p.name.startswith(".secateur-run")]
    if folder.is_dir():
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_wrong_folders_are_refused(folder: tuple[Path, list[Any]], tmp_path: Path) -> None:
    dense, batches = folder
    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, ArtifactError, "no folder", batches=batches)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, ArtifactError, "config.json", batches=batches)
    with pytest.raises(ArtifactError, match="own folder"):
        sc.prune_checkpoint(dense, dense, sc.SparseGPT(), 0.5, batches=batches)
    out.mkdir()
    (out / "thesis.txt").write_text("not ours")
    with pytest.raises(ArtifactError, match="not overwritten"):
        sc.prune_checkpoint(dense, out, sc.SparseGPT(), 0.5, batches=batches)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_missing_and_damaged_shards_are_refused(folder: tuple[Path, list[Any]], tmp_path: Path) -> None:
    dense, batches = folder
    shards = sorted(dense.glob("*.safetensors"))
    assert len(shards) > 2
    one = shards[1].read_bytes()
    shards[1].unlink()
    refused(dense, tmp_path / "out", ArtifactError, "missing", batches=batches)
    shards[1].write_bytes(one[:-100])
    refused(dense, tmp_path / "out", ArtifactError, shards[1].name, batches=batches)
    shards[1].write_bytes(one)
    tensors = load_file(shards[1])
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shards[1], {"format": "pt"})
    refused(dense, tmp_path / "out", ArtifactError, "", batches=batches)


def test_bad_data_and_settings_are_refused(folder: tuple[Path, list[Any]], tmp_path: Path) -> None:
    dense, batches = folder
    out = tmp_path / "out"
    refused(dense, out, StatsError, "No batches", batches=[])
    refused(dense, out, PatternError, "NM", batches=batches, pattern=sc.NM(2, 7), sparsity=None)
    refused(dense, out, sc.SparsityError, "between 0 and 1", batches=batches, sparsity=1.5)
    refused(dense, out, sc.SelectionError, "matches no", batches=batches, where=sc.Where(include="nothing"))
    refused(dense, out, StatsError, "Embedding", batches=batches, where=sc.Where(also="*embed_tokens*"))
    ids = batches[0]["input_ids"]
    refused(dense, out, StatsError, "index out of range", batches=[{"input_ids": ids + 10**6}])


def change(folder: Path, what: Callable[[Tensor], Any]) -> None:
    """Change one weight in the files, in place."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("layers.1.mlp.up_proj.weight"):
                what(tensors[name])
                save_file(tensors, shard, {"format": "pt"})


def test_infinite_activations_are_an_error_with_the_layer(
    folder: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    dense, batches = folder
    change(dense, lambda weight: weight.fill_(3e38))
    refused(dense, tmp_path / "out", NonFiniteError, "layers.1.mlp.down_proj", batches=batches)


def test_inputs_that_are_always_zero_go_first(folder: tuple[Path, list[Any]], tmp_path: Path) -> None:
    dense, batches = folder
    change(dense, lambda weight: weight[:7].zero_())
    report = sc.prune_checkpoint(dense, tmp_path / "out", sc.SparseGPT(), 0.5, batches=batches)
    down = load_all(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"]
    assert not down[:, :7].any()
    assert any("7 of" in note and "layers.1.mlp.down_proj" in note for note in report.notes)


def load_all(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    batches = saved("albert", tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path / "out", sc.StreamError, "prune it in memory", batches=batches)


def test_an_earlier_result_is_replaced_only_at_the_end(
    folder: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    dense, batches = folder
    out = tmp_path / "out"
    sc.prune_checkpoint(dense, out, sc.SparseGPT(), 0.5, batches=batches)
    first = (out / "secateur.json").read_bytes()
    with pytest.raises(NonFiniteError):
        broken = tmp_path / "broken"
        shutil.copytree(dense, broken)
        change(broken, lambda weight: weight.fill_(3e38))
        sc.prune_checkpoint(broken, out, sc.SparseGPT(), 0.5, batches=batches)
    assert (out / "secateur.json").read_bytes() == first
    sc.load(out)
    shutil.rmtree(out / ".secateur-run")
    report = sc.prune_checkpoint(dense, out, sc.SparseGPT(), 0.7, batches=batches)
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    sc.load(out)


def test_experts_that_lie_one_by_one_in_the_files_stay_so(tmp_path: Path) -> None:
    batches = saved("mixtral", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", sc.SparseGPT(), 0.5, batches=batches)
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.shape for k, v in pruned.items()} == {k: v.shape for k, v in dense.items()}
    experts = [k for k in pruned if "experts" in k]
    assert len(experts) > 10
    for key in experts:  # each expert of a stack is a layer of its own
        assert float((pruned[key] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), key
        assert not torch.equal(pruned[key], dense[key])


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_experts_that_do_not_make_the_stack(fault: str, tmp_path: Path) -> None:
    batches = saved("mixtral", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    key = sorted(k for k in tensors if "experts" in k)[0]
    if fault == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][1:]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"experts.*copy or download all files again"):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", sc.SparseGPT(), 0.5, batches=batches)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("marian", r"embed_positions.* when it is loaded"), ("nomic_bert", "in a way that is not known here")],
)
def test_weights_that_are_made_in_other_ways_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    batches = saved(name, tmp_path / "dense")
    with pytest.raises(StreamError, match=reason):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", sc.SparseGPT(), 0.5, batches=batches)
    assert not (tmp_path / "out").exists()
