"""Models entered behind their blocks: the same as the model's own pass, or seen not to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from benchmarks import zoo
from benchmarks.blocks import agreement
from secateur.collect.batches import Batch
from secateur.core.names import select
from secateur.reconstruct.consumers import consumers_of
from secateur.stream.states import States
from secateur.stream.walk import Walk, enterable

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations

ENTERED = """
    bart bert bloom convbert deberta deit dinov2 distilbert electra falcon gemma gemma2 gpt2 gpt_neo gpt_neox
    gptj llama mamba mistral mixtral mpt olmo opt phi qwen2 qwen3 roberta stablelm swin t5 vit whisper
"""


def known(text: str) -> list[str]:
    there = set(zoo.names("transformers"))
    return [name for name in (f"transformers/{n}" for n in text.split()) if name in there]


def way(name: str) -> tuple[nn.Module, Batch, Any, int, str | None]:
    model, args, kwargs = zoo.build(name)
    batch = Batch(args, kwargs, None)
    consumers, _ = consumers_of(model, [t.name for t in select(model).targets])
    return model, batch, *enterable(model, consumers, batch)


@pytest.mark.parametrize("name", known(ENTERED))
def test_the_output_is_the_same_behind_any_number_of_blocks(name: str) -> None:
    model, batch, chain, limit, why = way(name)
    assert chain.blocks and limit == len(chain.blocks), why
    assert agreement(model, batch, chain, limit) <= 1e-5


class Skipping(nn.Module):
    """What the first block returns is used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[3](self.blocks[2](self.blocks[1](first)) - 3 * first)


class Counting(nn.Module):
    """A block that does something else every time that it is called: a state outside of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.memory = None
        for block in self.blocks:
            x = block(x)
            self.memory = x if self.memory is None else self.memory + x
        return x * self.memory


def test_models_that_use_a_block_twice_are_seen_to() -> None:
    torch.manual_seed(0)
    batch = Batch((torch.randn(2, 4),), {}, None)
    for model, expected in ((Skipping(), 2), (Counting(), 3)):
        consumers, _ = consumers_of(model, [n for n, _ in model.named_parameters() if "weight" in n])
        chain, limit, why = enterable(model, consumers, batch)
        assert len(chain.blocks) == len(model.blocks)
        assert limit == expected and (why is None) == (limit == len(chain.blocks))


def test_a_walk_goes_on_with_what_pruned_blocks_return() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    data = [Batch((torch.randn(2, 4),), {}, None) for _ in range(2)]
    consumers, _ = consumers_of(model, ["0.weight", "1.weight", "2.weight"])
    chain, limit, _ = enterable(model, consumers, data[0])
    walk = Walk(model, chain, data, States())
    walk.advance(1)
    with torch.no_grad():
        model[0].weight.zero_()  # done: not run again
        model[1].weight.mul_(2)
    walk.advance(2)
    changed = copy.deepcopy(model)
    assert limit == 3 and walk.done == 2
    first = nn.Linear(4, 4)
    torch.manual_seed(0)
    first = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))[0]
    for i, batch in enumerate(data):
        torch.testing.assert_close(walk.states.get(1, i), changed[1](first(batch.args[0])).detach())
    assert set(walk.states.slots) == {1}


class Twice(nn.Module):
    """Long inputs go through a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.shape[0] > 2:
            x = self.inner(x)
        return self.after(x)


def test_a_layer_called_more_often_than_for_the_first_example_is_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Twice(), Twice(), nn.Linear(4, 4))
    data = [torch.randn(1, 4), torch.randn(3, 4)]
    with pytest.raises(
        sc.StatsError, match=r"inner.weight is called once for the first example, but 3 times"
    ):
        sc.prune_(model, sc.SparseGPT(), 0.5, batches=data)


def test_correction_is_the_ridge_regression_on_what_the_pruned_model_passes_on() -> None:
    from secateur.solvers import Quadratic
    from secateur.stream.solving import corrected

    torch.manual_seed(0)
    x = torch.randn(200, 6)
    z = x + 0.3 * torch.randn(200, 6)
    W = torch.randn(3, 6)
    gram, cross = z.T @ z / 200, x.T @ z / 200
    damping = 0.05
    ridge = damping * float(gram.diagonal().mean())
    shift = torch.linalg.lstsq(
        torch.cat([z, (200 * ridge) ** 0.5 * torch.eye(6)]), torch.cat([(x - z) @ W.T, torch.zeros(6, 3)])
    ).solution.T
    torch.testing.assert_close(corrected(W, Quadratic(gram), cross, damping), W + shift, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(corrected(W, Quadratic(gram), gram, damping), W)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_correction_and_reconstruction_bring_the_output_nearer_to_the_dense_models() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(*(Block(24) for _ in range(4)), nn.Linear(24, 5))
    mix = torch.randn(24, 24)
    data = [torch.randn(8, 32, 24) @ mix for _ in range(16)]
    fresh = torch.cat([torch.randn(8, 32, 24) @ mix for _ in range(4)])

    def lost(**options: Any) -> float:
        model = copy.deepcopy(dense)
        report = sc.prune_(model, sc.ALPS(), 0.7, batches=data, **options)
        report.masks.check(model)
        assert report.sparsity == pytest.approx(0.7, abs=1e-3)
        assert any("Tuning brought 4 blocks" in note for note in report.notes) == ("reconstruct" in options)
        with torch.no_grad():
            return float((model(fresh) - dense(fresh)).square().mean())

    plain = lost()
    settings = sc.Reconstruct(epochs=4, rate=0.2)
    corrected, tuned = lost(correction=0.01), lost(reconstruct=settings)
    both = lost(correction=0.01, reconstruct=settings)
    assert corrected < 0.95 * plain
    assert tuned < 0.8 * plain
    assert both < 0.8 * plain
    assert lost(reconstruct=settings) == tuned, "the same call gives the same weights"


def test_settings_that_mean_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    data = [torch.randn(3, 4)]
    for options in ({"correction": 0.01}, {"reconstruct": sc.Reconstruct()}):
        with pytest.raises(sc.SecateurError, match="only a solver"):
            sc.prune_(model, sc.Magnitude(), 0.5, batches=data, **options)
    with pytest.raises(sc.SecateurError, match="above 0"):
        sc.prune_(model, sc.ALPS(), 0.5, batches=data, correction=0.0)
    with pytest.raises(sc.SecateurError, match="at least 1"):
        sc.Reconstruct(epochs=0)
