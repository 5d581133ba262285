"""Structured pruning to a budget: promises met, reports that can be recomputed, all or nothing."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.cli.choices import GROUP_METHODS
from secateur.core.errors import (
    BudgetError,
    NonFiniteError,
    SecateurError,
    SelectionError,
    SparsityError,
    StatsError,
    SurgeryError,
)
from secateur.shrink.entry import check_choices
from tests.graph.prove import assert_same_state, redrawn, state_of

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(24).view(2, 12) * 5 % 64


class CNN(nn.Module):
    """Convolutions with batch normalisation, a residual connection, a flatten, neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.fc = nn.Sequential(nn.Linear(8 * 4, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Heads, and neurons, between fixed widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class MLP(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    return redrawn(LlamaForCausalLM(config)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "cnn": (lambda: redrawn(CNN()), IMAGES),
    "attention": (lambda: redrawn(Attention()), WORDS),
    "llama": (llama, {"input_ids": IDS}),
}


def build(name: str) -> tuple[nn.Module, Any]:
    make, example = MODELS[name]
    return make(), example


def mlp() -> nn.Module:
    return redrawn(MLP())


ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))


def run(model: nn.Module, example: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, Tensor) else out.logits


def batches_for(name: str) -> tuple[list[Any], Any]:
    """Batches, and the loss that goes with them."""
    g = torch.Generator().manual_seed(3)
    if name == "llama":
        rows = [torch.randint(64, (4, 12), generator=g) for _ in range(3)]
        return [{"input_ids": ids, "labels": ids} for ids in rows], None
    shape, classes = ((8, 3, 8, 8), 5) if name == "cnn" else ((8, 6, 16), 3)
    pairs = [
        (torch.randn(shape, generator=g), torch.randint(classes, (shape[0],), generator=g)) for _ in range(3)
    ]
    return pairs, F.cross_entropy


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that a failed or undone call must leave as it was."""
    config = getattr(model, "config", None)
    return {
        "state": state_of(model),
        "config": copy.deepcopy(config.to_dict()) if config is not None else None,
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "optimizer": copy.deepcopy(optimizer.state_dict()) if optimizer else None,
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_same_state(before["state"], after["state"])
    for part in ("config", "hooks", "requires"):
        assert before[part] == after[part], part
    torch.testing.assert_close(before["grads"], after["grads"], rtol=0, atol=0)
    torch.testing.assert_close(before["optimizer"], after["optimizer"], rtol=0, atol=0)


def kept(report: sc.ShrinkReport, kind: str) -> list[int]:
    return [g.kept for g in report.groups if g.kind == kind]


# ------ budgets


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("make", "fraction"), [(sc.Budget.params, 0.85), (sc.Budget.macs, 0.6), (sc.Budget.memory, 0.6)]
)
def test_the_budget_holds_and_the_report_can_be_recomputed(
    make: Callable[[float], sc.Budget], fraction: float, name: str
) -> None:
    model, example = build(name)
    before = sc.measure(model, example)
    report = sc.shrink_(model, example, make(fraction))
    assert 0.8 * report.asked < report.got <= report.asked
    after = sc.measure(model, example)
    for said, found in ((report.before, before), (report.after, after)):
        assert (said.parameters, said.macs, said.dense_bytes) == (
            found.parameters,
            found.macs,
            found.dense_bytes,
        )
    weights = sum(p.numel() for p in model.parameters())
    dense = {"params": before.parameters, "macs": before.macs, "memory": 4 * before.parameters}
    now = {"params": weights, "macs": after.macs, "memory": 4 * weights}
    quantity = make(fraction).quantity
    assert report.asked == pytest.approx(fraction * dense[quantity])
    assert report.got == now[quantity]
    graph = sc.Graph.trace(model, **example) if isinstance(example, dict) else sc.Graph.trace(model, example)
    assert (graph.cost().params, graph.cost().macs) == (after.parameters, after.macs)
    assert report.check is not None and report.check.ok and report.check.change > 1e-3
    # The sizes that the report states are those of the weights.
    for group in report.groups:
        if group.kind in ("neurons", "filters"):
            weight = model.get_parameter(group.name.split(" of ")[1])
            assert weight.shape[0] == group.kept


def test_memory_counts_what_a_cache_of_keys_and_values_really_takes() -> None:
    from transformers import DynamicCache

    model, example = build("llama")
    report = sc.shrink_(model, example, sc.Budget.memory(0.7, batch=3, context=50))
    cache = DynamicCache()
    ids = torch.randint(64, (3, 50))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held > 0
    assert report.got == held + sum(p.nbytes for p in model.parameters()) <= report.asked


class Sleepy(nn.Module):
    """Takes two microseconds for each hidden unit, whatever else the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4096), nn.Linear(4096, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(2e-6 * len(self.up.weight))
        return self.down(self.up(x).relu())


def test_seconds_are_measured() -> None:
    model = redrawn(Sleepy())
    report = sc.shrink_(model, torch.randn(1, 4), sc.Budget.seconds(0.3))
    assert report.before.latency is not None and report.after.latency is not None
    assert report.asked == pytest.approx(0.3 * report.before.latency.median)
    assert report.got == report.after.latency.median < report.before.latency.median
    assert kept(report, "neurons")[0] < 3000


def test_an_absolute_limit_and_a_budget_that_holds_already() -> None:
    model, example = build("cnn")
    before = everything(model)
    batches, loss = batches_for("cnn")
    report = sc.shrink_(model, example, sc.Budget.params(1.0), batches=batches, loss=loss)
    assert report.got == report.asked and all(g.kept == g.size for g in report.groups)
    assert_unchanged(before, everything(model))
    dense = sum(p.numel() for p in model.parameters())
    report = sc.shrink_(model, example, sc.Budget.params(at_most=dense - 1))
    assert 0.9 * dense < report.got <= dense - 1
    with pytest.raises(BudgetError, match="cannot be reached"):
        sc.shrink_(model, example, sc.Budget.params(at_most=100))


# ------ what may be cut


def test_alignment_minimum_largest_and_fixed_sparsity() -> None:
    model, example = build("cnn")
    report = sc.shrink_(
        model,
        example,
        sc.Budget.params(0.6),
        multiple_of=4,
        minimum={"filters": 8},
        maximum_sparsity={"neurons": 0.5},
    )
    assert all(n % 4 == 0 for n in kept(report, "filters") + kept(report, "neurons"))
    assert min(kept(report, "filters")) >= 8 and min(kept(report, "neurons")) >= 12
    model, example = build("cnn")
    report = sc.shrink_(model, example, sc.Budget.params(0.9), sparsity={"neurons of *": 0.25})
    assert kept(report, "neurons") == [18]


def test_fixed_and_largest_sparsity_count_from_the_dense_model_in_every_step() -> None:
    model, example = build("cnn")
    report = sc.shrink_(
        model,
        example,
        sc.Budget.params(0.65),
        steps=3,
        sparsity={"neurons": 0.25},
        maximum_sparsity={"filters": 0.6},
    )
    assert kept(report, "neurons") == [18] and min(kept(report, "filters")) >= 7


def test_kinds_and_exclude_name_what_stays() -> None:
    model, example = build("attention")
    report = sc.shrink_(model, example, sc.Budget.params(0.9), kinds="heads")
    assert kept(report, "heads") == [3] and kept(report, "neurons") == [40]
    model, example = build("cnn")
    report = sc.shrink_(model, example, sc.Budget.params(0.7), exclude="fc.*")
    assert kept(report, "neurons") == [24] and kept(report, "filters")[0] < 16
    with pytest.raises(SelectionError, match=r"exclude='nothing\.like\.it' matches no group"):
        sc.shrink_(model, example, sc.Budget.params(0.7), exclude="nothing.like.it")
    with pytest.raises(SelectionError, match="leaves nothing"):
        sc.shrink_(model, example, sc.Budget.params(0.7), exclude="*")
    model, example = build("llama")
    width = "width of model.embed_tokens.weight[1]"  # a name in full, not a range of characters
    report = sc.shrink_(model, example, sc.Budget.params(0.9), kinds=("width", "neurons"), exclude=width)
    assert kept(report, "width") == [32] and min(kept(report, "neurons")) < 40


def test_the_width_is_cut_if_asked_and_clusters_keep_equal_shares() -> None:
    model, example = build("llama")
    report = sc.shrink_(
        model, example, sc.Budget.params(0.5), kinds=None, scope=sc.Local(), criterion=sc.Random(0)
    )
    shares = {g.kept / g.size for g in report.groups if g.kind == "head_dim"}
    assert len(shares) == 1
    assert kept(report, "width")[0] == model.get_parameter("model.embed_tokens.weight").shape[1] < 32


def test_a_group_of_a_broken_cluster_stays_whole() -> None:
    model, example = build("llama")
    graph = sc.Graph.trace(model, **example)
    tied = {g for cluster in graph.clusters() for g in cluster}
    assert tied, "without clusters this shows nothing"
    one = next(iter(tied))
    report = sc.shrink_(model, example, sc.Budget.params(0.85), kinds=(one.kind, "neurons"), exclude=one.name)
    whole = {g.name for g in report.groups if g.kept == g.size}
    assert {g.name for g in tied} <= whole
    with pytest.raises(SelectionError, match="sized by one number"):
        sc.shrink_(model, example, sc.Budget.params(0.8), kinds=one.kind, exclude=one.name)


def test_queries_keep_their_number_in_the_report_where_one_key_value_group_is_left() -> None:
    model, example = build("llama")
    report = sc.shrink_(
        model,
        example,
        sc.Budget.params(0.75),
        kinds=("kv_groups", "neurons"),
        sparsity={"kv_groups": 0.75},
        steps=2,
    )
    assert kept(report, "kv_groups") == [1, 1] and kept(report, "queries") == [2, 2]
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (8, 32)


def test_steps_follow_groups_that_are_called_something_else_later() -> None:
    """With one key-value group left, its queries are plain heads; what was asked of them still holds."""
    model, example = build("llama")
    report = sc.shrink_(
        model,
        example,
        sc.Budget.params(0.55),
        kinds=("kv_groups", "queries", "neurons"),
        sparsity={"kv_groups": 0.75},
        minimum={"queries": 2},
        exclude="*layers.1.mlp*",
        steps=3,
    )
    assert kept(report, "kv_groups") == [1, 1] and kept(report, "queries") == [2, 2]
    first, second = kept(report, "neurons")
    assert second == 48 and first < 40
    assert report.got <= report.asked


@pytest.mark.parametrize(
    "scope", [sc.Local(), sc.Global(), sc.Global(per_cost=True), sc.Isomorphic()], ids=repr
)
def test_every_scope_meets_the_budget(scope: Any) -> None:
    model, example = build("cnn")
    report = sc.shrink_(model, example, sc.Budget.params(0.5), scope=scope)
    assert report.got <= report.asked
    if scope == sc.Local():
        shares = [g.sparsity for g in report.groups if g.kind in ("neurons", "filters")]
        assert max(shares) - min(shares) <= 1 / 16 + 1e-9


def test_scores_decide_which_units_stay() -> None:
    model = mlp()
    with torch.no_grad():
        model.up.weight[::2] *= 100
    rows = model.up.weight.detach()[::2].clone()
    sc.shrink_(model, ROWS, sc.Budget.params(0.53))
    assert torch.equal(model.up.weight, rows)


# ------ criteria, steps, repair


@pytest.mark.parametrize("name", ["cnn", "llama"])
@pytest.mark.parametrize("method", GROUP_METHODS)
def test_every_criterion_prunes_or_says_why_not(method: str, name: str) -> None:
    model, example = build(name)
    before = everything(model)
    batches, loss = batches_for(name)
    refused = {("bn-scale", "llama"), ("expert-output", "cnn"), ("expert-output", "llama")}
    # A fully connected layer has no batch normalisation.
    kinds = "filters" if method == "bn-scale" and name == "cnn" else ("filters", "neurons", "kv_groups")
    call = {"criterion": GROUP_METHODS[method](0), "batches": batches, "loss": loss, "repair": None}
    if (method, name) in refused:
        with pytest.raises(StatsError):
            sc.shrink_(model, example, sc.Budget.params(0.8), kinds=kinds, **call)
        assert_unchanged(before, everything(model))
        return
    report = sc.shrink_(model, example, sc.Budget.params(0.8), kinds=kinds, **call)
    assert report.got <= report.asked and report.check is not None and report.check.ok


@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_steps_measure_anew_and_meet_the_same_budget(name: str) -> None:
    batches, loss = batches_for(name)
    found = []
    for steps in (1, 3):
        model, example = build(name)
        report = sc.shrink_(
            model,
            example,
            sc.Budget.params(0.6),
            criterion=sc.Taylor(),
            batches=batches,
            loss=loss,
            steps=steps,
        )
        assert report.got <= report.asked and len(report.cuts) == steps == len(report.repairs)
        found.append(run(model, example))
    assert not torch.equal(*found)


def test_a_saved_surgery_of_several_steps_is_replayed(tmp_path: Any) -> None:
    model, example = build("cnn")
    fresh = copy.deepcopy(model)
    report = sc.shrink_(model, example, sc.Budget.params(0.6), steps=2)
    report.save_surgery(tmp_path / "surgery.json")
    sc.replay_(fresh, tmp_path / "surgery.json")
    assert torch.equal(run(model, example), run(fresh, example))


class Doubled(nn.Module):
    """Every unit twice, the second one at a hundredth: the first half can do the work of both."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1}
        self.up: nn.Module = nn.Conv2d(3, 12, **conv) if convolution else nn.Linear(6, 12)
        self.down: nn.Module = nn.Conv2d(12, 3, **conv) if convolution else nn.Linear(12, 6)
        redrawn(self)
        with torch.no_grad():
            self.up.weight[6:] = self.up.weight[:6] / 100
            self.up.bias[6:] = self.up.bias[:6] / 100
            self.down.weight[:, 6:] *= 80

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("how", ["parallel", "sequential"])
@pytest.mark.parametrize("convolution", [True, False])
def test_repair_lets_what_stays_do_the_work_of_what_went(convolution: bool, how: Any) -> None:
    example = IMAGES if convolution else ROWS
    errors = {}
    for repair in (None, how):
        model = Doubled(convolution)
        dense, old = run(model, example), model.up.weight.detach().clone()
        report = sc.shrink_(
            model,
            example,
            sc.Budget.params(0.6),
            criterion=sc.ActivationNorm(),
            batches=[example],
            repair=repair,
            sparsity={"*": 0.5},
        )
        assert torch.equal(model.up.weight, old[:6])
        errors[repair] = float((run(model, example) - dense).norm() / dense.norm())
        assert report.settings["repair"] == (repair or "none")
        layers = [x for r in report.repairs for x in r.layers]
        assert [x.name for x in layers] == (["down.weight"] if repair else [])
        assert all(x.error_after < 1e-4 < x.error_before for x in layers)
    assert errors[how] < 1e-2 < 0.1 < errors[None]


@pytest.mark.parametrize("name", ["cnn", "attention", "llama"])
def test_layers_are_nearer_to_the_dense_ones_after_repair(name: str) -> None:
    model, example = build(name)
    batches, loss = batches_for(name)
    report = sc.shrink_(model, example, sc.Budget.params(0.7), batches=batches, loss=loss)
    (repair,) = report.repairs
    assert repair.layers
    for layer in repair.layers:
        assert layer.error_after <= layer.error_bias * (1 + 1e-9) <= layer.error_before * (1 + 2e-9)


def test_normalisation_is_measured_anew() -> None:
    model, example = build("cnn")
    batches, loss = batches_for("cnn")
    sc.shrink_(model, example, sc.Budget.params(0.7), batches=batches[:1], loss=loss)
    seen: list[Tensor] = []
    handle = model.block[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for module in model.modules():  # each layer with the statistics of the batch
        module.train(isinstance(module, nn.BatchNorm2d))
    kept_statistics = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        model(batches[0][0])
    handle.remove()
    mean, var = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3))
    torch.testing.assert_close(kept_statistics["block.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept_statistics["block.1.running_var"], var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_the_optimizer_goes_on_with_what_is_left_of_its_state(make: Any) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(ROWS).square().mean().backward()
        optimizer.step()
    dense = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    old = model.up.weight.detach().clone()
    sc.shrink_(model, ROWS, sc.Budget.params(0.5), optimizer=optimizer)
    rows = [int((old == row).all(1).nonzero()) for row in model.up.weight.detach()]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        state = optimizer.state[model.get_parameter(name)]
        for key, value in dense[name].items():
            expected = value.index_select(dim, torch.tensor(rows)) if getattr(value, "ndim", 0) else value
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected)), (name, key)
    optimizer.zero_grad()
    model(ROWS).square().mean().backward()
    optimizer.step()


# ------ undone, and all or nothing


@pytest.mark.parametrize(("name", "steps"), [("cnn", 1), ("cnn", 2), ("attention", 2), ("llama", 1)])
def test_undo_gives_the_very_model_back(name: str, steps: int) -> None:
    model, example = build(name)
    optimizer = torch.optim.Adam(model.parameters())
    run(model, example)
    model.train()
    out = model(**example) if isinstance(example, dict) else model(example)
    (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
    optimizer.step()
    before, parameters = everything(model, optimizer), list(model.parameters())
    batches, loss = batches_for(name)
    report = sc.shrink_(
        model,
        example,
        sc.Budget.params(0.7),
        batches=batches,
        loss=loss,
        steps=steps,
        optimizer=optimizer,
    )
    assert model.training
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in parameters)
    report.undo()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_unchanged(before, everything(model, optimizer))


class Failing:
    """A loss that fails at its call numbered `at`, and remembers that it did."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the loss failed")
        return F.cross_entropy(output, target)


def _bad_calls() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    batches, loss = batches_for("cnn")
    data = {"batches": batches, "loss": loss}
    few = sc.Budget.params(0.7)
    yield "zeros", {"budget": sc.Budget.sparsity(0.5)}, BudgetError, "counts weights that become zero"
    yield "too small", {"budget": sc.Budget.params(0.01)}, BudgetError, "cannot be reached"
    yield "too small for data", {"budget": sc.Budget.macs(0.001), **data}, BudgetError, "cannot be reached"
    yield "steps", {"budget": few, "steps": 0}, BudgetError, "at least one step"
    yield "late", {"budget": sc.Budget.params(0.05), "steps": 4, **data}, BudgetError, "cannot be reached"
    yield "kinds", {"budget": few, "kinds": "heads"}, SelectionError, "No group of the kinds heads"
    yield "scope", {"budget": few, "scope": sc.Local}, SecateurError, r"Pass Local\(\)"
    yield "criterion", {"budget": few, "criterion": sc.Taylor}, SecateurError, r"Pass Taylor\(\)"
    yield "no data", {"budget": few, "criterion": sc.Taylor(), "loss": loss}, StatsError, "batches"
    yield "empty", {"budget": few, "criterion": sc.Taylor(), **data, "batches": []}, StatsError, "batch"
    yield "empty for repair", {"budget": few, "batches": []}, StatsError, "batch"
    yield "align", {"budget": few, "multiple_of": 0}, BudgetError, "at least 1"
    yield "name", {"budget": few, "minimum": {"nothing": 2}}, SelectionError, "'nothing' matches"
    yield "fixed", {"budget": few, "sparsity": {"filters": 1.0}}, SparsityError, "below 1"
    yield "all kept", {"budget": few, "minimum": 1000}, BudgetError, "cannot be reached"
    wrong = [(torch.zeros(2, 7, 8, 8), torch.zeros(2, dtype=torch.long))]
    yield "odd batch", {"budget": few, "batches": wrong}, Exception, "channels"
    nan = [(torch.full((4, 3, 8, 8), math.nan), torch.zeros(4, dtype=torch.long))]
    yield "NaN batch", {"budget": few, "batches": nan}, NonFiniteError, "NaN|finite"


@pytest.mark.parametrize(("call", "error", "words"), [pytest.param(*c[1:], id=c[0]) for c in _bad_calls()])
def test_bad_input_is_one_sentence_and_the_model_stays(
    call: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, example = build("cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    with pytest.raises(error, match=words) as caught:
        sc.shrink_(model, example, optimizer=optimizer, **call)
    assert "\n" not in str(caught.value) or not isinstance(caught.value, SecateurError)
    assert_unchanged(before, everything(model, optimizer))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ((0.5, None, None), r"takes a budget, such as Budget\.macs\(0\.5\); got 0\.5"),
        ((sc.Budget.macs(0.5), "local", None), "got 'local'"),
        ((sc.Budget.macs(0.5), sc.Global, None), r"Pass Global\(\), not the class"),
        ((sc.Budget.macs(0.5), None, "best"), "\"sequential\" or None; got 'best'"),
    ],
)
def test_choices_of_the_wrong_kind_are_named(choices: tuple[Any, ...], words: str) -> None:
    with pytest.raises(SecateurError, match=words):
        check_choices(*choices)


def _times_called(steps: int) -> int:
    """How often a criterion calls the loss."""
    model, example = build("cnn")
    batches, _ = batches_for("cnn")
    loss = Failing(10**9)
    sc.shrink_(
        model, example, sc.Budget.params(0.6), criterion=sc.Taylor(), batches=batches, loss=loss, steps=steps
    )
    return 10**9 - loss.left


def test_a_loss_that_fails_in_the_second_step_takes_the_first_one_back() -> None:
    once, twice = _times_called(1), _times_called(2)
    assert twice > once
    model, example = build("cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, _ = batches_for("cnn")
    before = everything(model, optimizer)
    call = {"criterion": sc.Taylor(), "batches": batches, "steps": 2, "optimizer": optimizer}
    for at in (0, once - 1, once, twice - 1):
        with pytest.raises(RuntimeError, match="the loss failed"):
            sc.shrink_(model, example, sc.Budget.params(0.6), loss=Failing(at), **call)
        assert_unchanged(before, everything(model, optimizer))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model, example = build("cnn")
    with torch.no_grad():
        model.block[0].weight[0, 0, 0, 0] = value
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(NonFiniteError):
        sc.shrink_(model, example, sc.Budget.params(0.7))
    torch.testing.assert_close(before, dict(model.state_dict()), rtol=0, atol=0, equal_nan=True)


class BreaksWhenCut(MLP):
    """Runs while it is dense; its trace follows any size."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        if type(x) is Tensor and int(str(h.shape[-1])) < 16:
            raise RuntimeError("not this small")
        return self.down(h)


def test_a_model_that_fails_when_it_is_smaller_is_put_back() -> None:
    model = redrawn(BreaksWhenCut())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="not this small"):
        sc.shrink_(model, ROWS, sc.Budget.params(0.5), batches=[ROWS], optimizer=optimizer)
    assert_unchanged(before, everything(model, optimizer))


# ------ the proof


class Laundered(MLP):
    """Uses a size as a number, by way of text, where no trace sees it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h / float(str(h.shape[-1])))


class Noisy(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(4)


class Answer(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) > 0


class Normed(MLP):
    """A mean over the neurons, so that removing them is not zeroing them."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h - h.mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "words"),
    [(Laundered(), "does not do what the dense one does"), (Noisy(), "does not repeat itself")],
    ids=["wrong", "noisy"],
)
@pytest.mark.parametrize("batches", [None, [ROWS]], ids=["bare", "repaired"])
def test_the_proof_stops_what_is_wrong(model: nn.Module, words: str, batches: Any) -> None:
    redrawn(model)
    before = everything(model)
    with pytest.raises(SurgeryError, match=words):
        sc.shrink_(model, ROWS, sc.Budget.params(0.5), batches=batches)
    assert_unchanged(before, everything(model))


def test_without_the_proof_the_report_says_so() -> None:
    for model, check, why in (
        (Noisy(), False, "check=False"),
        (Answer(), True, "no floating-point"),
        (Normed(), True, "not the same as zeroing"),
    ):
        report = sc.shrink_(redrawn(model), ROWS, sc.Budget.params(0.5), check=check)
        assert report.check is None and report.unproved is not None and why in report.unproved
        assert "Not compared" in " ".join(str(report).split())


# ------ any kind of model


@pytest.mark.parametrize("name", ["cnn", "llama"])
def test_frozen_models_and_bfloat16(name: str) -> None:
    model, example = build(name)
    model.requires_grad_(False)
    batches, loss = batches_for(name)
    sc.shrink_(model, example, sc.Budget.params(0.8), criterion=sc.Taylor(), batches=batches, loss=loss)
    assert not any(p.requires_grad for p in model.parameters())
    model, example = build(name)
    model.bfloat16()
    example = example.bfloat16() if isinstance(example, Tensor) else example
    report = sc.shrink_(model, example, sc.Budget.params(0.8))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.got <= report.asked and report.check is not None


def test_wrappers_are_looked_through() -> None:
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        model = mlp()
        wrapped = wrap(model)
        report = sc.shrink_(wrapped, ROWS, sc.Budget.params(0.5))
        assert model.up.weight.shape[0] == kept(report, "neurons")[0] < 16
        assert wrapped.state_dict().keys() == wrap(MLP()).state_dict().keys()


class Tied(nn.Module):
    """One weight under two names, and both of its dimensions cut in step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.again = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(12, 10)
        self.again.weight = self.up.weight
        self.down = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.down(torch.relu(self.up(h)) + torch.relu(self.again(h + 1)))


def test_tied_weights_stay_tied() -> None:
    model = redrawn(Tied())
    report = sc.shrink_(model, ROWS, sc.Budget.params(0.6), batches=[ROWS])
    assert model.up.weight is model.again.weight and report.got <= report.asked
    assert report.after.parameters == sum(p.numel() for p in model.parameters())


def test_a_model_without_groups_says_what_is_frozen() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(SelectionError, match=r"the model has none\. Frozen: .*(input|output)"):
        sc.shrink_(model, torch.zeros(1, 4), sc.Budget.params(0.5))
    with pytest.raises(SelectionError, match="No group of the kinds any"):
        sc.shrink_(nn.ReLU(), torch.zeros(1, 4), sc.Budget.macs(0.5), kinds=None)


def test_two_units_leave_one_and_never_none() -> None:
    model = redrawn(MLP(2))
    report = sc.shrink_(model, ROWS, sc.Budget.params(at_most=18))
    assert kept(report, "neurons") == [1] and model.down.weight.shape == (4, 1)
    with pytest.raises(SelectionError, match="the model has none"):
        sc.shrink_(model, ROWS, sc.Budget.params(0.5))


def test_the_report_is_plain_data_and_prints(tmp_path: Any) -> None:
    model, example = build("cnn")
    batches, loss = batches_for("cnn")
    report = sc.shrink_(model, example, sc.Budget.macs(0.6), batches=batches, loss=loss)
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert [g["kept"] for g in data["groups"]] == [g.kept for g in report.groups]
    assert data["settings"]["criterion"] == "Magnitude(norm=1)" and data["check"]["error"] < 1e-4
    text = str(report)
    assert "multiply-accumulates" in text and "neurons of fc.0.weight" in text and "equal" in text
