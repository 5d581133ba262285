"""The zoo builds, its models are deterministic, and their outputs depend on what is in them."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import zoo
from benchmarks.zoo.transformers_models import GROUPS

NEEDS_TORCHVISION = ("torchvision", "timm")


def built(name: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The model, and its outputs twice."""
    model, args, kwargs = zoo.build(name)
    with torch.no_grad():
        return model, zoo.tensors(model(*args, **kwargs)), zoo.tensors(model(*args, **kwargs))


@pytest.mark.parametrize("name", zoo.SUBSET)
@pytest.mark.filterwarnings("ignore")  # of other packages, about their own imports and configs
def test_a_model_of_the_subset_builds_and_is_alive(name):
    if name.startswith(NEEDS_TORCHVISION) and not zoo.available():
        pytest.skip("torchvision and timm are not installed: benchmarks/zoo/requirements.txt says how.")
    state = torch.get_rng_state()
    model, first, second = built(name)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert not model.training
    assert first and all(bool(t.isfinite().all()) for t in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # of order 1
    assert 0.02 < float(first[0].std()) < 50

    # Nothing hides: all weights are of order 1 / sqrt(fan-in) or more, so no layer is close to doing nothing.
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter.numel() > 8 and "bias" not in key:
            assert float(parameter.detach().abs().mean()) > 0.01, key


def test_names_are_unique_and_the_subset_is_of_them():
    names = zoo.names()
    assert len(set(names)) == len(names)
    assert len(zoo.SUBSET) == len(set(zoo.SUBSET)) == 40
    assert set(zoo.SUBSET) <= set(names)
    assert zoo.names("transformers") == tuple(f"transformers/{n}" for group in GROUPS.values() for n in group)


@pytest.mark.filterwarnings("ignore")
def test_the_name_alone_decides_the_weights_and_inputs():
    model, _, kwargs = zoo.build("transformers/llama")
    torch.manual_seed(5)
    again, _, inputs = zoo.build("transformers/llama")
    other, _, _ = zoo.build("transformers/mistral")
    assert torch.equal(kwargs["input_ids"], inputs["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


class Hidden(nn.Module):
    """A residual block that default initialisation hides: LayerScale 1e-6 and a norm at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.block[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.scale * self.block(x)).mean((2, 3)))


def effect(model: Hidden, x: Tensor) -> float:
    """Change of the output, relative to its spread, when the block's first filters are zero."""
    with torch.no_grad():
        before = model(x)
        for parameter in (
            model.block[0].weight,
            model.block[0].bias,
            model.block[1].weight,
            model.block[1].bias,
        ):
            parameter[:4] = 0
        return float((model(x) - before).std() / before.std())


def test_redraw_brings_out_what_initialisation_hides(generator):
    x = torch.randn(2, 3, 10, 10, generator=generator)
    assert effect(Hidden().eval(), x) < 1e-5
    model = Hidden().eval()
    zoo.redraw_(model, generator, (x,), {})
    assert 0.3 < float(model(x).detach().std()) < 3
    assert effect(model, x) > 0.05
    assert float((model.block[1].running_mean != 0).sum()) == 8
    assert float(model.scale.detach().min()) >= 0.5 and float(model.scale.detach().max()) <= 1.5


def test_redraw_keeps_ties_and_removes_its_hooks(generator):
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)).eval()
    model[2].weight = model[0].weight
    zoo.redraw_(model, generator, (torch.arange(7)[None],), {})
    assert model[2].weight is model[0].weight
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
