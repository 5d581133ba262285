"""The schema takes what the reader of recipes takes, and refuses what it refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import pytest
import torch
import yaml
from torch import nn

import secateur as sc
from secateur import recipe
from secateur.cli import app
from secateur.core.errors import SecateurError
from secateur.prune import prune_
from secateur.recipe_schema import objects_of, recipe_schema

SCHEMA = recipe_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)

GOOD = [
    "prune: {criterion: Magnitude, sparsity: 0.5}",
    "prune: {criterion: {Magnitude: 2}, sparsity: 0.5, allocation: global_}",
    "prune: {criterion: {Magnitude: [2]}, sparsity: 0.5, allocation: {OWL: {width: 0.1}}}",
    "prune: {criterion: {Magnitude: {norm: 2}}, pattern: {NM: [2, 4]}, where: {Where: {include: '*.q'}}}",
    "prune: {criterion: ALPS, sparsity: 0.5, reconstruct: {Reconstruct: {epochs: 3}}}",
    "prune: {criterion: {Select: Wanda}, sparsity: 0.5, where: {Where: {exclude: [a, b]}}}",
    "prune: {criterion: Wanda, allocation: {custom: {layer.weight: 0.3}}}",
    "{prune: {criterion: Wanda, sparsity: 0.5}, train: {steps: 5}, model: a, eval: b, seed: 3}",
    "train: {steps: 5, method: {L0: {sparsity: 0.5, begin: 0, end: 4, kinds: [heads]}}}",
    "train: {steps: 5, method: {Movement: {schedule: {one_shot: {sparsity: 0.5, at: 3}}, soft: Soft}}}",
    "train: {steps: 5, method: {ACDC: {criterion: Magnitude, sparsity: 0.9, phases: {Phases: [1, 2, 4]}}}}",
    "train: {steps: 5, method: {Regularize: {penalty: {L1: 0.1}}}, distill: {hidden: {a: b}}}",
    "{prune: {criterion: Magnitude, sparsity: 0.5}, train: {steps: 5, method: null, distill: null}}",
    "train: {steps: 5, method: {Dynamic: {rule: RigL, sparsity: 0.9, end: 4, when: {every: 2}}}}",
]
BAD = [
    "- 1",
    "samples: 3",
    "prun: {}",
    "train: {rate: 0.1}",
    "train: {steps: 5, rates: 1}",
    "train: {steps: five}",
    "train: {steps: 5, method: Gradual}",
    "{prune: {criterion: Magnitude, sparsity: 0.5}, train: {steps: 5, distill: {wieght: 0.5}}}",
    "train: {steps: 5, method: {Gradul: {}}}",
    "train: {steps: 5, method: {Gradual: {criterion: Magnitude, shedule: 3}}}",
    "prune: {criterion: Magnitud, sparsity: 0.5}",
    "prune: {criterion: Magnitude, sparsty: 0.5}",
    "prune: {criterion: Magnitude, sparsity: 0.5, model: x}",
    "prune: {criterion: {Magnitude: {norn: 2}}, sparsity: 0.5}",
    "prune: {criterion: Magnitude, pattern: {NM: [2, 4, 8]}}",
    "prune: {criterion: Magnitude, pattern: {NM: [four, 2]}}",
    "prune: {criterion: Magnitude, pattern: NM}",
    "train: {steps: 5, method: {Gradual: {criterion: Magnitude, schedule: {one_shot: [0.5, 9]}}}}",
]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", recipe.shipped().values(), ids=lambda f: f.stem)
def test_shipped_recipes_fit(file: Path) -> None:
    CHECK.validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("text", GOOD)
def test_both_take(text: str) -> None:
    data = yaml.safe_load(text)
    recipe.of(data)
    CHECK.validate(data)


@pytest.mark.parametrize("text", BAD)
def test_both_refuse(text: str) -> None:
    data = yaml.safe_load(text)
    with pytest.raises(SecateurError):
        recipe.of(data)
    assert not CHECK.is_valid(data)


def test_all_that_a_recipe_can_give_is_known() -> None:
    """An argument that is an object of ours has names, so that a new one is not forgotten."""
    for f in (*recipe.CONSTRUCTORS.values(), *recipe.METHODS.values(), prune_):
        hints: dict[str, Any] = get_type_hints(f.__init__ if isinstance(f, type) else f)
        for name in set(inspect.signature(f).parameters) - recipe.BROUGHT:
            ours = "secateur." in str(hints[name]) and "secateur.stats" not in str(hints[name])
            assert not ours or objects_of(name, f.__name__), (f, name)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["schema"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == SCHEMA
    app(["schema", "--out", str(tmp_path / "s.json")], standalone_mode=False)
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA


def test_kinds_and_hidden_are_taken_as_they_are_written() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    settings = {"schedule": {"one_shot": {"sparsity": 0.5, "at": 3}}, "kinds": ["neurons"]}
    method = recipe.method_of({"UnitMovement": settings}, model, graph=sc.Graph.trace(model, x))
    assert isinstance(method, sc.UnitMovement) and method.kinds == ("neurons",)

    teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    given: dict[str, Any] = {"weight": 0.0, "hidden": {"0": "0"}, "hidden_weight": 1.0}
    with recipe.call("train.distill", sc.Distill, given, student=model, teacher=teacher) as distill:
        output = model(x)
        loss = distill(torch.zeros(()), output)
    expected = (model[0](x) - teacher[0](x)).square().sum() / teacher[0](x).square().sum()
    torch.testing.assert_close(loss, expected)
