"""`secateur eval --tasks`: tasks of lm-eval, from local files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.cli.task_folder import check_task_folder, sandboxed

STORIES = "stories260k"
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
ROWS = [
    ("Once upon a time, there was a little", ["girl named Lily.", "Lily girl. named"], 0),
    ("The cat was very happy and", ["yellow the. into", "said thank you."], 1),
    ("Tom and his mom went to the", ["park to play.", "said happy of."], 0),
    ("She was sad because her toy was", ["broken.", "and."], 1),  # so that not all are right
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task `ending`: which of two ends a sentence."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.jsonl"
    keys = ("context", "choices", "label")
    file.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in ROWS))
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "ending.yaml").write_text(TASK.format(name="ending", file=file, text="{{context}}"))
    return made


def right(folder: Path) -> list[bool]:
    """Whether each answer is the more likely one, by a plain loop."""
    from transformers import AutoTokenizer

    model: Any = sc.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = []
    for context, choices, label in ROWS:
        scores = []
        for choice in choices:
            start = len(tokenizer(context)["input_ids"])
            ids = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.no_grad():
                log_p = F.log_softmax(model(ids).logits[0, :-1], -1)
            scores.append(float(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        out.append(scores.index(max(scores)) == label)
    return out


@pytest.mark.realdata(STORIES)
def test_a_task_is_scored_as_a_plain_loop_does(
    data_root: Path, folder: Path, tmp_path: Path, run: Run, capsys: Capture
) -> None:
    expected = right(data_root / STORIES)
    assert 0 < sum(expected) < 4
    out = tmp_path / "out.json"
    words = ["eval", data_root / STORIES, "--tasks", "ending", "--task-dir", folder]
    assert run(*words, "--json", "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text()) and set(found) == {"tasks"}
    (score,) = found["tasks"]["scores"]
    share = sum(expected) / 4
    # The standard error of a mean, with the sample's own variance.
    stderr = (share * (1 - share) / 3) ** 0.5
    assert score.pop("stderr") == pytest.approx(stderr)
    assert score == {"task": "ending", "metric": "acc", "value": share, "n": 4, "shots": 0}
    assert found["tasks"]["limit"] is None and found["tasks"]["harness"].startswith("lm_eval ")

    text = tmp_path / "text.txt"
    text.write_text(" ".join(row[0] for row in ROWS))
    assert run(*words, "--limit", 2, "--data", text) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "the first 2 examples of each task" in shown
    assert f"{sum(expected[:2]) / 2:.4f}" in shown and "ending" in shown


@pytest.mark.realdata(STORIES)
def test_a_model_that_only_secateur_loads_and_a_group_of_tasks(
    data_root: Path, folder: Path, tmp_path: Path, run: Run, capsys: Capture
) -> None:
    out = tmp_path / "small"
    words = ["--macs", 0.8, "--scope", "global", "--kinds", "neurons"]
    assert run("shrink", data_root / STORIES, "--out", out, *words) == 0
    again = (folder / "ending.yaml").read_text().replace("ending", "again")
    (folder / "again.yaml").write_text(again + "num_fewshot: 1\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [ending, again]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    capsys.readouterr()
    assert run("eval", out, "--tasks", "both", "--task-dir", folder, "--json") == 0
    scores = {s["task"]: s for s in json.loads(capsys.readouterr().out)["tasks"]["scores"]}
    assert scores["ending"]["value"] == sum(right(out)) / 4
    assert scores["again"]["shots"] == 1 and scores["ending"]["shots"] == 0
    both = (scores["ending"]["value"] + scores["again"]["value"]) / 2
    assert scores["both"]["value"] == pytest.approx(both) and scores["both"]["n"] == 8


@pytest.mark.realdata(STORIES)
def test_what_lm_eval_cannot_do_is_one_sentence(
    data_root: Path, folder: Path, tmp_path: Path, run: Run, capsys: Capture
) -> None:
    task = (folder / "ending.yaml").read_text()
    (folder / "hub.yaml").write_text(task.replace("ending", "hub").replace("path: json", "path: some/where"))
    (folder / "gone.yaml").write_text(task.replace("ending", "gone").replace("rows.jsonl", "gone.jsonl"))
    (folder / "odd.yaml").write_text(task.replace("ending", "odd").replace("context", "nothing"))
    (folder / "reach.yaml").write_text(task.replace("ending", "reach").replace("context", "cycler.__init__"))
    capsys.readouterr()
    for name, said in (
        ("nope", f"There is no task nope in {folder}, which has ending, gone, hub, odd, reach."),
        ("ending,hub", "The data of ending, hub cannot be had"),
        ("gone", "The data of gone cannot be had"),
        ("odd", "lm-eval cannot run odd: UndefinedError"),
        ("reach", "lm-eval cannot run reach: SecurityError"),
    ):
        assert run("eval", data_root / STORIES, "--tasks", name, "--task-dir", folder) == 1
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.startswith("Error:") and said in shown, (name, shown)


@pytest.mark.slow
def test_an_unknown_task_of_lm_eval(llama: Path, run: Run, capsys: Capture) -> None:
    assert run("eval", llama, "--tasks", "arc_esay,piqa") == 1
    shown = capsys.readouterr().err
    assert "lm-eval has no task arc_esay." in shown and "arc_easy" in shown


def test_bad_calls(llama: Path, folder: Path, tmp_path: Path, run: Run, capsys: Capture) -> None:
    from transformers import BertConfig, BertModel

    bert = tmp_path / "bert"
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(bert)
    for words, said in (
        ((llama,), "Say what to measure"),
        ((llama, "--limit", 3, "--data", "x.txt"), "--limit is for tasks"),
        ((llama, "--task-dir", folder, "--data", "x.txt"), "--task-dir is for tasks"),
        ((llama, "--tasks", " , "), "--tasks is a list of names"),
        ((llama, "--tasks", "ending", "--task-dir", tmp_path / "none"), "There is no task folder"),
        ((llama, "--tasks", "ending", "--task-dir", bert), "no file ends in .yaml"),
        ((llama, "--tasks", "ending", "--task-dir", folder), "holds no tokenizer"),
        ((bert, "--tasks", "ending", "--task-dir", folder), "Tasks are for language models"),
    ):
        capsys.readouterr()
        assert run("eval", *words) == 1
        shown = " ".join(capsys.readouterr().err.split())
        assert said in shown, (words, shown)


CODE = {
    "function": ("doc_to_text: !function utils.run", "!function"),
    "under another name": ("%TAG !e! !\n---\ndoc_to_text: !e!function utils.run", "!function"),
    "written otherwise": ("doc_to_text: !<!function> utils.run", "!function"),
    "of Python": ("doc_to_text: !!python/name:os.system", "python/name:os.system"),
    "class": ("class: utils.Task", "a Python class"),
    "script of the Hub": ("metric_list: [{metric: acc, hf_evaluate: true}]", "a script of the Hub"),
    "script at hand": ("metric_list: [{metric: ./metric.py}]", "no metric of lm-eval"),
    "in a group": ("group: g\ntask: [{task: t, metric_list: [{metric: [x]}]}]", "no metric of lm-eval"),
    "builder": ("dataset_path: pandas", "neither a data set OWNER/NAME nor one of"),
    "prompts": ("use_prompt: 'x.yaml:y'", "prompts from elsewhere"),
    "from outside": ("include: ../outside.yaml", "outside of it"),
    "included": ("include: [template]", "!function"),
    "no YAML": ("a: [", "cannot be read as YAML"),
    "not there": ("include: nowhere", "cannot be read as YAML"),
}


@pytest.mark.parametrize("case", CODE)
def test_a_task_with_code_is_refused_before_anything_runs(folder: Path, case: str) -> None:
    content, said = CODE[case]
    mark = folder / "ran"
    for name in ("utils.py", "metric.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    (folder / "template").write_text("doc_to_text: !function utils.run")
    (folder.parent / "outside.yaml").write_text("doc_to_text: x")
    check_task_folder(folder)
    (folder / "bad.yaml").write_text(content)
    with pytest.raises(sc.SecateurError) as error:
        check_task_folder(folder)
    assert said in str(error.value) and str(folder) in str(error.value)
    assert not mark.exists()


def test_a_link_to_elsewhere_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside.yaml"
    outside.write_text("doc_to_text: x")
    (folder / "link.yaml").symlink_to(outside)
    with pytest.raises(sc.SecateurError, match="outside of it"):
        check_task_folder(folder)


def test_templates_of_lm_eval_are_put_back() -> None:
    from lm_eval import utils

    before = utils.env
    with sandboxed():
        assert utils.apply_template("{{a | regex_replace('x', 'y')}}\n", {"a": "xx"}) == "yy\n"
        with pytest.raises(Exception, match="unsafe"):
            utils.apply_template("{{a.__class__.__mro__}}", {"a": "x"})
    assert utils.env is before
