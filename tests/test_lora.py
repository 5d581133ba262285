"""LoRA on pruned models: what is trained is what is merged, and pruned weights stay zero."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.core.errors import MaskError, NonFiniteError
from secateur.lora import LoraError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "concepts" / "after.md"

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "with a bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}


class Net(nn.Module):
    """With transformers' transposed linear layer among the others."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first, self.second, self.head = nn.Linear(12, 20), Conv1D(16, 20), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


pytestmark = [
    # What peft says when it sets by itself what Conv1D needs, and again for the layers that are none.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # What transformers says of a property that peft reads.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def pruned(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, sc.Masks]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, sc.prune_(model, sc.Magnitude(), 0.6, pattern=sc.PerRow()).masks


def with_lora(model: nn.Module, targets: Any = ("first", "second"), **settings: Any) -> PeftModel:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), **settings)
    return get_peft_model(model, config)


def train(model: nn.Module, steps: int = 20) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=g).to(model.base_model.model.head.weight.dtype)
        optimizer.zero_grad()
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
    model.eval()


def some_inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def delta(layer: Any, adapter: str = "default") -> Tensor:
    """What an adapter adds, `[out, in]`, from its parameters."""
    return layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight


# ------ held, then merged: nothing is lost


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [pytest.param(s, torch.float32, id=f"{name}, float32") for name, s in VARIANTS.items()]
    # peft decomposes weights in float32 only.
    + [pytest.param(s, torch.bfloat16, id=f"{n}, bfloat16") for n, s in VARIANTS.items() if n != "pissa"],
)
def test_the_model_that_is_trained_is_the_one_that_is_merged(settings: dict, dtype: torch.dtype) -> None:
    base, masks = pruned(dtype)
    start, x = copy.deepcopy(base), some_inputs(dtype)
    tolerance = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 0.04}
    model = with_lora(base, lora_dropout=0.2, **settings)
    with sc.hold_lora(model, masks):
        model.eval()
        torch.testing.assert_close(model(x), start(x), **tolerance)
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(p)
        train(model)
        trained = model(x)
        assert (trained - start(x)).abs().max() > 0.2
        merged = sc.merge_lora_(model, masks)
    assert type(merged.model) is Net and merged.model.state_dict().keys() == start.state_dict().keys()
    masks.check(merged.model)
    torch.testing.assert_close(merged.model(x), trained, **tolerance)
    assert merged.lost == 0 and merged.by_layer() == dict.fromkeys(masks, 0)
    assert "nothing of them lay on pruned weights" in str(merged)
    for name, mask in masks.items():  # all that is kept has moved
        moved = merged.model.get_parameter(name) != start.get_parameter(name)
        assert moved[mask].float().mean() > (0.99 if dtype == torch.float32 else 0.5)


@st.composite
def cases(draw):
    """A mask of any density, rank, scaling, and whether a layer is transposed."""
    outputs, inputs = draw(st.integers(1, 6)), draw(st.integers(2, 7))
    seed, density = draw(st.integers(0, 2**31)), draw(st.floats(0, 1))
    return (
        outputs,
        inputs,
        draw(st.integers(1, 4)),
        draw(st.floats(0.1, 8)),
        seed,
        density,
        draw(st.booleans()),
    )


@given(cases())
@settings(max_examples=40)
def test_zeros_are_exact_and_the_loss_is_counted(case: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    outputs, inputs, rank, alpha, seed, density, transposed = case
    torch.manual_seed(seed)
    layer = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    masks = sc.Masks({"0.weight": torch.rand(layer.weight.shape) < density})
    base = nn.Sequential(layer)
    masks.apply_(base)
    before = layer.weight.detach().clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config)
    change = delta(model.base_model.model[0]).detach()
    change = change.T if transposed else change
    held = copy.deepcopy(model)
    with sc.hold_lora(held, masks):
        x = torch.randn(3, inputs)
        seen = held(x)
        again = sc.merge_lora_(held, masks)
    assert again.lost == 0
    torch.testing.assert_close(again.model(x), seen)
    merged = sc.merge_lora_(model, masks)
    masks.check(merged.model)
    keep = masks["0.weight"]
    torch.testing.assert_close(merged.model[0].weight.detach(), before + change * keep)
    assert torch.equal(merged.model[0].weight, again.model[0].weight)
    power, gone = change.square().sum().item(), (change * ~keep).square().sum().item()
    assert merged.power == pytest.approx({"0.weight": power}, rel=1e-4)
    assert merged.lost == pytest.approx(gone / power, rel=1e-4, abs=1e-9)
    assert merged.by_layer() == {"0.weight": merged.lost}


def test_merging_without_a_hold_says_what_is_lost() -> None:
    base, masks = pruned()
    model = with_lora(base)
    train(model)
    x = some_inputs()
    trained = model(x).detach()
    layers = {f"{n}.weight": getattr(model.base_model.model, n) for n in ("first", "second")}
    changes = {n: delta(layer).detach() for n, layer in layers.items()}
    changes["second.weight"] = changes["second.weight"].T
    gone = {n: float((d * ~masks[n]).square().sum()) for n, d in changes.items()}
    whole = {n: float(d.square().sum()) for n, d in changes.items()}
    merged = sc.merge_lora_(model, masks)
    masks.check(merged.model)
    assert merged.lost == pytest.approx(sum(gone.values()) / sum(whole.values()), rel=1e-4)
    assert merged.by_layer() == pytest.approx({n: gone[n] / whole[n] for n in gone}, rel=1e-4)
    assert 0.3 < merged.lost < 0.9 and "This is not the model that was trained" in str(merged)
    assert (merged.model(x) - trained).abs().max() > 0.05


def test_dora_merged_without_a_hold_has_the_norms_that_were_trained() -> None:
    base, masks = pruned()
    model = with_lora(base, use_dora=True)
    train(model)
    norms = model.base_model.model.first.lora_magnitude_vector["default"].weight.detach().clone()
    merged = sc.merge_lora_(model, masks)
    torch.testing.assert_close(merged.model.first.weight.norm(dim=1), norms)
    masks.check(merged.model)
    assert 0.3 < merged.lost < 0.9


def test_masks_that_keep_everything_leave_peft_as_it_is() -> None:
    base, _ = pruned()
    masks = sc.Masks({n: torch.ones_like(base.get_parameter(n), dtype=torch.bool) for n in ("first.weight",)})
    model = with_lora(base, use_dora=True)
    train(model)
    x, theirs = some_inputs(), copy.deepcopy(model).merge_and_unload()
    plain = model(x)
    with sc.hold_lora(model, masks):
        torch.testing.assert_close(model(x), plain)
    assert torch.equal(sc.merge_lora_(model, masks).model(x), theirs(x))


def test_weights_that_the_masks_remove_go_wherever_they_come_from() -> None:
    torch.manual_seed(0)
    base = Net()
    masks = sc.prune_(copy.deepcopy(base), sc.Magnitude(), 0.5).masks  # never applied to the base itself
    merged = sc.merge_lora_(with_lora(base), masks)
    masks.check(merged.model)
    assert merged.model.first.weight[masks["first.weight"]].all()


def test_several_adapters_and_only_the_active_ones() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    for name, targets in (("second", ["first"]), ("third", ["second"]), ("idle", ["first", "second"])):
        model.add_adapter(name, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second", "third"])
    first = model.base_model.model.first
    expected = base.first.base_layer.weight + masks["first.weight"] * (delta(first) + delta(first, "second"))
    x = some_inputs()
    with sc.hold_lora(model, masks):
        held = model(x)
        model.set_adapter("idle")  # held as well, whichever is active
        idle = model(x)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(sc.merge_lora_(twin, masks).model(x), idle)
        model.base_model.set_adapter(["default", "second", "third"])
        merged = sc.merge_lora_(model, masks)
    torch.testing.assert_close(merged.model(x), held)
    torch.testing.assert_close(merged.model.first.weight, expected)
    masks.check(merged.model)


def test_one_batch_for_several_adapters() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    model.eval()
    x = some_inputs()[:3]
    with sc.hold_lora(model, masks):
        mixed = model(x, adapter_names=["default", "__base__", "other"])
        for i, name in enumerate(["default", None, "other"]):
            if name is None:
                with model.disable_adapter():
                    alone = model(x)
            else:
                model.set_adapter(name)
                alone = model(x)
            torch.testing.assert_close(mixed[i], alone[i])


# ------ training while held


def test_gradients_are_those_of_the_masked_product_dropout_and_all() -> None:
    base, masks = pruned()
    model = with_lora(base, lora_dropout=0.3, init_lora_weights=False)
    net, x = model.base_model.model, some_inputs()
    model.train()

    def layer(h: Tensor, name: str) -> Tensor:
        module, keep = getattr(net, name), masks[f"{name}.weight"]
        weight = module.base_layer.weight
        if name == "second":
            weight, keep = weight.T, keep.T
        dropped = F.dropout(h, 0.3)
        return F.linear(h, weight, module.base_layer.bias) + F.linear(dropped, delta(module) * keep)

    def by_hand(x: Tensor) -> Tensor:
        return net.head(torch.tanh(layer(torch.tanh(layer(x, "first")), "second")))

    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    expected = by_hand(x)
    gradients = torch.autograd.grad(expected.square().mean(), parameters)
    with sc.hold_lora(model, masks):
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            torch.manual_seed(3)
            y = run(x)
            torch.testing.assert_close(y, expected)
            ours = torch.autograd.grad(y.square().mean(), parameters)
            for a, b in zip(ours, gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_release_gives_the_model_back() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    x, keys = some_inputs(), model.state_dict().keys()
    before = model(x)
    hold = sc.hold_lora(model, masks)
    assert model.state_dict().keys() == keys
    assert not torch.allclose(model(x), before)
    hold.release()
    hold.release()
    assert torch.equal(model(x), before)
    with pytest.raises(ZeroDivisionError), sc.hold_lora(model, masks):
        raise ZeroDivisionError
    assert torch.equal(model(x), before)
    for module in model.modules():
        assert not module._forward_hooks and "get_delta_weight" not in vars(module)


def test_pefts_own_merge_is_masked_while_held() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    x = some_inputs()
    with sc.hold_lora(model, masks):
        held = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), held)
        first = model.base_model.model.first.base_layer.weight
        assert not first[~masks["first.weight"]].any()
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), held)


def test_a_failed_merge_leaves_the_hold_in_place() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    x = some_inputs()
    with sc.hold_lora(model, masks):
        held = model(x)
        with torch.no_grad():
            weight = model.base_model.model.second.lora_B["default"].weight
            was = weight.clone()
            weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"adapters of second\.weight hold NaN"):
            sc.merge_lora_(model, masks)
        with torch.no_grad():
            weight.copy_(was)
        assert torch.equal(model(x), held)
        assert sc.merge_lora_(model, masks).lost == 0


def test_a_copy_made_while_held_holds_adapters_of_its_own() -> None:
    base, masks = pruned()
    model = with_lora(base, init_lora_weights=False)
    x = some_inputs()
    with sc.hold_lora(model, masks):
        held, twin = model(x), copy.deepcopy(model)
        train(model, steps=3)
        torch.testing.assert_close(twin(x), held)  # not moved by the training of the other
        merged = sc.merge_lora_(twin, masks)
    torch.testing.assert_close(merged.model(x), held)
    assert merged.lost == 0


def test_saved_adapters_are_those_of_peft(tmp_path: Path) -> None:
    base, masks = pruned()
    start = copy.deepcopy(base)
    model = with_lora(base)
    with sc.hold_lora(model, masks):
        train(model)
        held = model(some_inputs())
        model.save_pretrained(tmp_path / "adapter")
    masks.save(tmp_path / "masks.safetensors")
    again = PeftModel.from_pretrained(start, tmp_path / "adapter")
    masks = sc.Masks.load(tmp_path / "masks.safetensors")
    with sc.hold_lora(again, masks):
        torch.testing.assert_close(again(some_inputs()), held)
        torch.testing.assert_close(sc.merge_lora_(again, masks).model(some_inputs()), held)


# ------ what is refused, and what peft does as ever


def test_layers_that_no_mask_covers_are_merged_whole() -> None:
    base, masks = pruned()
    model = with_lora(base, ["first", "second", "head"], init_lora_weights=False)
    head = base.head.base_layer.weight + delta(base.head)
    merged = sc.merge_lora_(model, masks)
    torch.testing.assert_close(merged.model.head.weight, head)
    assert merged.power.keys() == masks.keys()


def unchanged(
    model: nn.Module, masks: sc.Masks, error: type[Exception], says: str, hold: bool = True
) -> None:
    """Both ways raise, and nothing has been changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        sc.merge_lora_(model, masks)
    if hold:
        with pytest.raises(error, match=says):
            sc.hold_lora(model, masks)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())


def test_models_without_adapters() -> None:
    base, masks = pruned()
    unchanged(base, masks, LoraError, "those of a PeftModel; got Net")
    model = with_lora(base)
    model.delete_adapter("default")
    unchanged(model, masks, LoraError, "no active LoRA adapter", hold=False)
    base, masks = pruned()
    model = with_lora(base, ["head"])
    with pytest.raises(LoraError, match="No LoRA adapter lies on a masked weight"):
        sc.hold_lora(model, masks)
    assert sc.merge_lora_(model, masks).power == {}
    other = get_peft_model(pruned()[0], IA3Config(target_modules=["first"], feedforward_modules=[]))
    unchanged(other, masks, LoraError, "those of IA3Model, not LoRA's")


def test_masks_that_do_not_fit() -> None:
    base, masks = pruned()
    model = with_lora(base)
    more = sc.Masks({**masks, "third.weight": masks["first.weight"]})
    unchanged(model, more, MaskError, r"no parameter third\.weight, which the masks cover")
    other = sc.Masks({**masks, "second.weight": masks["second.weight"].T})
    unchanged(model, other, MaskError, r"second\.weight has shape \(20, 16\), its mask \(16, 20\)")


def test_adapters_that_cannot_be_merged_under_a_mask() -> None:
    base, masks = pruned()
    empty = sc.Masks({**masks, "first.weight": masks["first.weight"] & (torch.arange(20) != 7)[:, None]})
    empty.apply_(base)
    model = with_lora(base, use_dora=True)
    unchanged(model, empty, LoraError, r"norms of the rows of first\.weight, one of which has no weight left")
    column = sc.Masks({**masks, "second.weight": masks["second.weight"] & (torch.arange(16) != 7)})
    unchanged(
        model, column, LoraError, r"norms of the rows of second\.weight, one of which has no weight left"
    )
    base, masks = pruned()
    model = with_lora(base)
    model.merge_adapter()
    unchanged(model, masks, LoraError, r"merged into first\.weight already: call unmerge_adapter")


def test_adapters_on_other_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3))
    masks = sc.prune_(net, sc.Magnitude(), 0.5).masks
    convolution = get_peft_model(copy.deepcopy(net), LoraConfig(target_modules=["0", "2"]))
    unchanged(
        convolution, masks, LoraError, "The adapter on 0 is peft's Conv1d, which cannot be merged under"
    )
    # Without its mask it is merged as ever.
    rest = sc.Masks({"2.weight": masks["2.weight"]})
    with sc.hold_lora(convolution, rest):
        y = convolution(torch.ones(1, 2, 6))
        torch.testing.assert_close(sc.merge_lora_(convolution, rest).model(torch.ones(1, 2, 6)), y)
    trained_whole = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    unchanged(trained_whole, rest, LoraError, "trains a copy of 2 as a whole")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning")
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
def test_what_peft_would_refuse_half_way_is_refused_first() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3))
    masks = sc.prune_(net, sc.Magnitude(), 0.5).masks
    model = get_peft_model(net, LoraConfig(target_modules=["0", "1"], lora_bias=True))
    unchanged(
        model, masks, LoraError, r"default of 1\.weight has a bias, lora_bias=True, but the layer has none"
    )
    base, masks = pruned()
    routed = with_lora(base, alora_invocation_tokens=[1, 2])
    unchanged(routed, masks, LoraError, "ALoraLinearVariant: only plain LoRA and DoRA")


# ------ language models


def language_model(kind: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        ).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    ids = torch.randint(40, (4, 12))
    report = sc.prune_(model, sc.Wanda(), 0.5, batches=[{"input_ids": ids}])
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else "all-linear"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with sc.hold_lora(tuned, report.masks):
        with torch.no_grad():
            held = tuned(ids).logits
        merged = sc.merge_lora_(tuned, report.masks)
    assert type(merged.model) is type(model)
    report.masks.check(merged.model)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, held, rtol=1e-3, atol=1e-4)
    sc.save(merged.model, tmp_path / "out", masks=report.masks)
    again = type(model).from_pretrained(tmp_path / "out")
    report.masks.check(again)


@pytest.mark.realdata("stories260k", "tinystories")
@pytest.mark.slow
def test_the_page_runs(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its snippets one after the other, with a few stories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL_DIR").symlink_to(data_root / "stories260k")
    (tmp_path / "stories.json").symlink_to(data_root / "tinystories" / "stories.json")
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) >= 4
    exec(compile("\n".join(snippets), str(PAGE), "exec"), {})
