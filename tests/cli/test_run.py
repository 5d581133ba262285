"""`secateur run`: every recipe that is shipped, and what a recipe may get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur import recipe
from secateur.core.errors import SecateurError
from secateur.shrink_page import page_of

RECIPES = list(recipe.shipped().values())
Run = Callable[..., int]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of layers that tiny models lose


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Texts for the model that knows words w3 to w63."""
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(3, 63, (24,), generator=g).tolist()) for _ in range(16)]
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    return file


def small(file: Path, tmp_path: Path) -> Path:
    """A shipped recipe with a hundredth of its steps, everything else as it is."""
    import yaml

    data = yaml.safe_load(file.read_text())

    def shorter(node: object) -> object:
        if not isinstance(node, dict):
            return node
        steps = ("steps", "begin", "end", "warmup", "dense_from", "sparse_from", "period")
        return {k: max(1, v // 50) if k in steps and v else shorter(v) for k, v in node.items()}

    out = tmp_path / file.name
    out.write_text(yaml.safe_dump(shorter(data)))
    return out


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes_run_and_keep_their_promise(
    file: Path, speaker: Path, words: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe.load(file)
    text = file.read_text()
    assert f"secateur run {file.stem} --model" in text
    out = tmp_path / "out"
    short = small(file, tmp_path)
    assert run("run", short, "--model", speaker, "--data", words, "--eval", words, "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert any(note.startswith("Mean loss on") for note in report["notes"])
    assert (out / "report.html").is_file() and "Saved in" in capsys.readouterr().out
    assert asked.train is not None and asked.train.steps >= 500
    model = sc.load(out)
    if file.stem == "heads_and_neurons":
        dense = sum(p.numel() for p in sc.load_hf(speaker)[0].parameters())
        assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters()) < 0.9 * dense
        asked_for = [change["asked"] for change in report["history"]]
        assert len(asked_for) > 2 and asked_for == sorted(asked_for)
        page = (out / "report.html").read_text()
        assert "While training" in page and "Training closed them." in page
        return
    promised = {"gradual": 0.7, "movement": 0.9, "one_shot_then_tune": 0.5, "dynamic": 0.8, "acdc": 0.8}
    goal = promised.get(file.stem, 0.6)
    assert report["totals"]["sparsity"] == pytest.approx(goal, abs=1e-3)
    sc.Masks.load(out / "masks.safetensors").check(model)


def test_a_run_is_the_api_by_hand(speaker: Path, words: Path, tmp_path: Path, run: Run) -> None:
    """The same seed, twice, gives the same weights; without training it is `secateur prune`."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "prune: {criterion: Wanda, sparsity: 0.5, pattern: PerRow, where: {Where: {exclude: '*down_proj'}}}\n"
        "train: {steps: 3, rate: 0.01}\n"
    )
    for name in ("a", "b"):
        assert run("run", file, "--model", speaker, "--data", words, "--out", tmp_path / name) == 0
    a, b = (sc.load(tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    masks = sc.Masks.load(tmp_path / "a" / "masks.safetensors")
    assert not any("down_proj" in name for name in masks)
    file.write_text("prune: {criterion: Magnitude, sparsity: 0.6, allocation: global_}\n")
    assert run("run", file, "--model", speaker, "--data", words, "--out", tmp_path / "c") == 0
    options = ["--sparsity", 0.6, "--allocation", "global", "--out", tmp_path / "d"]
    assert run("prune", speaker, *options) == 0
    c, d = (sc.load(tmp_path / name) for name in ("c", "d"))
    assert all(torch.equal(p, q) for p, q in zip(c.parameters(), d.parameters(), strict=True))


@pytest.mark.parametrize("method", ["L0: {sparsity: 0.3, begin: 1, end: 6}", "GroupLasso: {strength: 0.01}"])
def test_methods_on_the_graph(method: str, speaker: Path, words: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"train:\n  steps: 8\n  method:\n    {method}\n")
    assert run("run", file, "--model", speaker, "--data", words, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense = sum(p.numel() for p in sc.load_hf(speaker)[0].parameters())
    small = sum(p.numel() for p in sc.load(tmp_path / "out").parameters())
    assert report["after"]["parameters"] == small <= dense
    assert small < 0.95 * dense or not method.startswith("L0")


def test_blocks_that_training_closed_are_dropped(
    speaker: Path, words: Path, tmp_path: Path, run: Run
) -> None:
    """A target that takes whole blocks; the folder holds units cut and blocks dropped, in this order."""
    file = tmp_path / "r.yaml"
    l0 = "{sparsity: 0.9, begin: 1, end: 6, blocks: ['*.layers.*']}"
    file.write_text(f"train: {{steps: 8, method: {{L0: {l0}}}}}\n")
    assert run("run", file, "--model", speaker, "--data", words, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dense, small = sc.load_hf(speaker)[0], sc.load(tmp_path / "out")
    assert len(small.model.layers) < len(dense.model.layers)
    assert report["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    gone = len(dense.model.layers) - len(small.model.layers)
    assert len(report["dropped"]) == gone and report["dropped"][0].startswith("model.layers.")
    assert f"{gone} blocks were dropped as a whole." in (tmp_path / "out" / "report.html").read_text()
    assert report["settings"]["criterion"].startswith(
        "L0(sparsity=0.9, begin=1, end=6, rate=0.1, when=Every(i"
    )


RISE = "schedule: {linear: {initial: 0, final: 0.3, begin: 1, end: 9}}, when: {every: 2}"
LONG = {
    "none": "",
    "Gradual": f"{{criterion: Taylor, {RISE}}}",
    "Movement": f"{{{RISE}}}",
    "Dynamic": "{rule: RigL, sparsity: 0.5, end: 9, when: {every: 2}}",
    "ACDC": "{criterion: Magnitude, sparsity: 0.5, phases: {phases: "
    "{begin: 1, period: 2, dense_from: 5, sparse_from: 8}}}",
    "STR": f"{{{RISE}}}",
    "Growing": "{criterion: Magnitude, sparsity: 0.5, pick: 3, end: 9, increment: 0.1}",
    "UnitMovement": f"{{{RISE}}}",
    "L0": "{sparsity: 0.3, begin: 1, end: 9}",
}


# The others' states are tested without the command, and in `make test-all` with it.
@pytest.mark.parametrize(
    "method",
    [
        m if m in ("none", "Gradual", "UnitMovement") else pytest.param(m, marks=pytest.mark.slow)
        for m in LONG
    ],
)
def test_the_same_command_goes_on_bit_by_bit(
    method: str, speaker: Path, words: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    file = tmp_path / "r.yaml"
    prune = "prune: {criterion: Wanda, sparsity: 0.5}\n" if method == "none" else ""
    trains = "" if method == "none" else f", method: {{{method}: {LONG[method]}}}"
    file.write_text(f"{prune}train: {{steps: 12, rate: 0.01, warmup: 2, distill: {{weight: 0.5}}{trains}}}\n")
    command = ["run", file, "--model", speaker, "--data", words, "--save-every", 0, "--out"]
    assert run(*command, tmp_path / "whole") == 0
    assert not (tmp_path / "whole" / ".secateur-training").exists()

    steps = 0

    def stop(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal steps
        steps += isinstance(optimizer, torch.optim.AdamW)
        if steps == 6:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(stop)
    try:
        assert run(*command, tmp_path / "half") != 0
    finally:
        handle.remove()
    assert (tmp_path / "half" / ".secateur-training" / "state.safetensors").is_file()
    assert re.search(r"Step 5 of 12: training, loss \d\.\d{3}; kept to go on from\.", capsys.readouterr().out)
    assert run(*command, tmp_path / "half") == 0
    assert "Going on after step 5 of 12." in capsys.readouterr().out
    assert not (tmp_path / "half" / ".secateur-training").exists()
    whole, half = (sc.load(tmp_path / name) for name in ("whole", "half"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters(), strict=True))
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "half")]
    assert reports[0].get("history") == reports[1].get("history")
    assert len(reports[0]["losses"]) == 12 and reports[0]["losses"] == reports[1]["losses"]
    assert reports[0]["after"]["parameters"] == reports[1]["after"]["parameters"]


def test_the_course_of_the_loss_is_reported(speaker: Path, words: Path, tmp_path: Path, run: Run) -> None:
    """With a rate of zero, it is the loss of the model on all examples, again and again."""
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    distill = "distill: {weight: 0.9}"  # is not part of it
    file.write_text(
        f"train: {{steps: 101, batch: 16, rate: 0.0, {distill}, method: {{Gradual: "
        "{criterion: Magnitude, schedule: {linear: {initial: 0, final: 0.3, begin: 100, end: 101}}}}}\n"
    )
    assert run("run", file, "--model", speaker, "--data", words, "--eval", words, "--out", out) == 0
    report = sc.load_report(out)
    assert isinstance(report, sc.Report)
    assert [entry.step for entry in report.losses] == [*range(2, 101, 2), 101]
    loss = float(next(n for n in report.notes if n.startswith("Mean loss")).split(" before")[0].split()[-1])
    assert all(entry.loss == pytest.approx(loss, abs=1e-4) for entry in report.losses[:50])
    assert report.settings["training"].startswith("101 steps of 16 examples, AdamW, rate 0, falling to zero")
    assert report.settings["training"].endswith("as teacher (weight 0.9)") and report.settings["seed"] == "0"
    page = (out / "report.html").read_text()
    assert "training loss" in page and "101 steps of 16 examples" in page
    assert page == page_of(report)


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("prune: {criterion: Magnitude, sparsity: 0.5}\ntrain: {steps: 20, rate: 1.0e+30}", 2),
        # A temperature whose square overflows, while the loss of the task is as ever. The last step counts.
        (
            "train: {steps: 1, distill: {temperature: 1.0e+30}, method: {Gradual: "
            "{criterion: Magnitude, schedule: {one_shot: {sparsity: 0.5, at: 1}}}}}",
            1,
        ),
    ],
)
def test_a_gradient_that_is_no_number_ends_it(
    text: str,
    step: int,
    speaker: Path,
    words: Path,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(text)
    assert run("run", file, "--model", speaker, "--data", words, "--out", out) != 0
    said = " ".join(capsys.readouterr().err.split())
    found = re.search(
        r"In step (\d+) the training loss is \d\.\d+ and the norm of the gradient (nan|inf):", said
    )
    assert found and int(found[1]) == step and "train.rate" in said
    assert not out.exists()


def test_another_run_does_not_go_on(
    speaker: Path, words: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text("prune: {criterion: Magnitude, sparsity: 0.5}\ntrain: {steps: 5}\n")
    command = ["run", file, "--model", speaker, "--data", words, "--save-every", 0, "--out", out]
    state = out / ".secateur-training" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"no state")
    assert run(*command) != 0 and "not a safetensors file" in " ".join(capsys.readouterr().err.split())
    from secateur.training.state_file import save_state

    save_state({"key": "that of another run"}, state)
    assert run(*command) != 0
    assert "unfinished training with another recipe" in " ".join(capsys.readouterr().err.split())
    state.unlink()  # killed before the first state: begins anew
    assert run(*command) == 0 and not state.parent.exists()


def test_only_checked(speaker: Path, words: Path, tmp_path: Path, run: Run) -> None:
    command = [
        "run",
        "gradual",
        "--model",
        speaker,
        "--data",
        words,
        "--out",
        tmp_path / "out",
        "--steps",
        2,
    ]
    assert run(*command) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- 1", "mapping"),
        ("a: [", "not a YAML file"),
        ("samples: 3", "neither prunes nor trains"),
        ("prun: {}", "did you mean prune?"),
        ("train: {rate: 0.1}", "needs steps"),
        ("train: {steps: 5, rates: 1}", "did you mean rate?"),
        ("train: {steps: five}", "steps is a number"),
        ("train: {steps: 09}", "steps is a number"),  # not octal, as to YAML 1.1
        ("train: {steps: 5, warmup: 6}", "longer than 5"),
        ("train: {steps: 5, method: Gradual}", "with its settings"),
        ("train: {steps: 5, method: {Gradul: {}}}", "did you mean Gradual?"),
        ("prune: {criterion: Magnitud, sparsity: 0.5}", "did you mean Magnitude?"),
        ("prune: {criterion: os.system, sparsity: 0.5}", "is not known"),
        ("prune: {criterion: {Magnitude: {norn: 2}}, sparsity: 0.5}", "did you mean norm?"),
        ("prune: {criterion: {Magnitude: {norm: 7}}, sparsity: 0.5}", "prune.criterion.Magnitude: "),
        ("prune: {criterion: Magnitude, pattern: {NM: [2, 4, 8]}}", "too many positional arguments"),
        ("prune: {criterion: Magnitude, pattern: {NM: [four, 2]}}", "four"),
        ("prune: !!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_what_a_recipe_gets_wrong(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(SecateurError, match=complaint.replace("?", r"\?").replace(".", r"\.")):
        recipe.load(file)


@pytest.mark.parametrize("rate", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+.1e-3"])
def test_numbers_are_those_of_json(rate: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    method = "{Movement: {rate: 2e-2, schedule: {cubic: {initial: 0, final: .5, begin: 0, end: 4}}}}"
    file.write_text(f"train: {{steps: 5, rate: {rate}, method: {method}}}")
    found = recipe.load(file).train
    assert found is not None and found.rate == 1e-4 and found.method["Movement"]["rate"] == 0.02
    file.write_text("prune: {criterion: Magnitude, pattern: 2:4}")  # YAML 1.1 reads 2 minutes, 4 seconds
    with pytest.raises(SecateurError, match="'2:4' is not known"):
        recipe.load(file)


def test_what_the_command_refuses(
    speaker: Path, words: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"

    def refused(text: str, *options: object) -> str:
        file.write_text(text)
        assert run("run", file, *options) != 0
        return " ".join(capsys.readouterr().err.split())

    given = ["--model", speaker, "--data", words, "--out", tmp_path / "out"]
    assert "lacks data and out" in refused("prune: {}", "--model", speaker)
    assert "nothing prunes" in refused("train: {steps: 2}", *given)
    late = "train: {steps: 5, method: {Gradual: {criterion: Magnitude, schedule: {one_shot: [0.5, 9]}}}}"
    assert "positional" in refused(late, *given)
    late = late.replace("[0.5, 9]", "{sparsity: 0.5, at: 9}")
    assert "ends at step 9, but training takes 5" in refused(late, *given)
    assert "prune: Sparsity is the fraction" in refused(
        "prune: {criterion: Magnitude, sparsity: 1.5}", *given
    )
    assert run("run", "gradul") != 0 and "did you mean gradual?" in capsys.readouterr().err
    assert run("run", "gradual", "--show") == 0
    assert capsys.readouterr().out == recipe.shipped()["gradual"].read_text()
    assert run("run", tmp_path / "none.yaml") != 0 and "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
