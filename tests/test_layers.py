"""Dropped blocks: equal to bypassed ones, generation, configurations, records, optimizers, scores."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import realdata
from benchmarks.realdata.nets import ResNet20
from secateur.core.errors import ArtifactError, NonFiniteError, SecateurError, SelectionError, StatsError
from secateur.layers import (
    Block,
    Stack,
    angular_distance,
    block_influence,
    drop_layers_,
    every_other,
    first_blocks,
    last_blocks,
    loss_increase,
    lowest,
    replay_,
    stacks,
)

TEXT = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=None, max_position_embeddings=64)
LLAMA = TEXT | dict(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
GPT = dict(vocab_size=50, n_embd=24, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None)
BERT = TEXT | dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32)
IMAGE = dict(image_size=16, num_labels=5)
# Blocks have to matter for a test of what their absence does: the usual ones are nearly the identity.
LARGE = dict(initializer_range=0.3)

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA | LARGE),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA | LARGE | SLIDING | dict(use_sliding_window=True, max_window_layers=2),
    ),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | LARGE),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | LARGE | SLIDING | dict(query_pre_attn_scalar=6)),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | LARGE | SLIDING | dict(query_pre_attn_scalar=6)),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | LARGE | dict(no_rope_layers=[1, 0, 1, 0])),
    "mixtral": ("MixtralForCausalLM", LLAMA | LARGE | dict(num_local_experts=3, num_experts_per_tok=2)),
    "gpt2": ("GPT2LMHeadModel", GPT | LARGE),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        TEXT | LARGE | dict(hidden_size=24, num_layers=4, num_heads=4, window_size=3)
        | dict(attention_types=[[["global", "local"], 2]]),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", LLAMA | LARGE),
    "opt": ("OPTForCausalLM", TEXT | dict(hidden_size=24, ffn_dim=32, num_hidden_layers=4, init_std=0.3)
            | dict(num_attention_heads=4, word_embed_proj_dim=24)),
    "mamba": ("MambaForCausalLM", TEXT | LARGE | dict(hidden_size=24, num_hidden_layers=4, state_size=4)),
}  # fmt: skip


def build(name: str, settings: dict[str, Any], seed: int = 0) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    return cls(cls.config_class(**copy.deepcopy(settings))).eval()


def decoder(name: str) -> Any:
    return build(*DECODERS[name])


def ids(seed: int = 0, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, 50, (2, length), generator=generator)}


def picture(seed: int = 0, size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))}


@contextmanager
def skipping(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Blocks that do nothing, written without the code under test."""

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [model.get_submodule(n).register_forward_hook(skip, with_kwargs=True) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before: names, tensors, settings, configurations."""
    state = {name: id(p) for name, p in model.state_dict(keep_vars=True).items()}
    simple = int | float | str | list | tuple
    settings = {
        (name, key): copy.copy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, simple)
    }
    configs = {n: repr(vars(m.config)) for n, m in model.named_modules() if hasattr(m, "config")}
    return {"state": state, "settings": settings, "configs": configs}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_without_blocks_are_decoders_with_blocks_bypassed_and_generate_alike(name: str) -> None:
    model, example = decoder(name), ids()
    [stack] = stacks(model, example)
    assert stack.droppable == tuple(b.name for b in stack.blocks) and len(stack) == 4
    gone = [stack.blocks[0].name, stack.blocks[2].name]
    before = snapshot(model)
    prompt = dict(ids(1, 6), max_new_tokens=8, do_sample=False)
    with torch.no_grad(), skipping(model, gone):
        logits = model(**ids(2)).logits
        written = model.generate(**prompt, use_cache=False)
    record = drop_layers_(model, gone, example)
    with torch.no_grad():
        assert torch.equal(model(**ids(2)).logits, logits), name
        for cache in (False, True):
            assert torch.equal(model.generate(**prompt, use_cache=cache), written), (name, cache)
    assert record.config_ok and not record.notes, (name, record.notes)
    assert record.origin == {
        stack.blocks[0].name: stack.blocks[1].name,
        stack.blocks[1].name: stack.blocks[3].name,
    }
    record.undo()
    assert snapshot(model) == before, name


def test_blocks_matter_in_the_models_of_these_tests() -> None:
    for name in DECODERS:
        model = decoder(name)
        [stack] = stacks(model, ids())
        with torch.no_grad():
            logits = model(**ids()).logits
            for block in stack.droppable:
                with skipping(model, [block]):
                    assert (model(**ids()).logits - logits).abs().max() > 1e-3, block


@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3", "gpt_neo", "opt"])
def test_saved_by_transformers_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    model = decoder(name)
    assert drop_layers_(model, [0, -1], ids()).config_ok
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**ids()).logits, model(**ids()).logits)
    assert len(stacks(loaded, ids())[0]) == 2


def test_a_smaller_llama_with_the_same_weights_is_the_same_model() -> None:
    model = decoder("llama")
    small = build("LlamaForCausalLM", LLAMA | {"num_hidden_layers": 2})
    moved = {"0": "1", "1": "3"}  # what a hand would write
    big = model.state_dict()
    small.load_state_dict(
        {n: big[re.sub(r"layers\.(\d)", lambda m: f"layers.{moved[m[1]]}", n)] for n in small.state_dict()}
    )
    drop_layers_(model, ["model.layers.0", "model.layers.2"], ids())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in small.named_parameters()
    ]
    assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1]
    with torch.no_grad():
        assert torch.equal(model(**ids()).logits, small(**ids()).logits)


ENCODERS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Tensor]], list[str]]] = {
    "bert": ("BertForSequenceClassification", BERT | LARGE, ids, ["bert.encoder.layer"]),
    "distilbert": (
        "DistilBertForSequenceClassification",
        dict(vocab_size=50, dim=24, n_layers=4, n_heads=4, hidden_dim=32) | LARGE,
        ids,
        ["distilbert.transformer.layer"],
    ),
    "vit": (
        "ViTForImageClassification",
        BERT | IMAGE | LARGE | dict(patch_size=4),
        picture,
        ["vit.layers"],
    ),
    "swin": (
        "SwinForImageClassification",
        IMAGE | LARGE | dict(patch_size=2, embed_dim=12, depths=[2, 3], num_heads=[2, 4], window_size=2),
        picture,
        ["swin.encoder.layers", "swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"],
    ),
    "convnext": (
        "ConvNextForImageClassification",
        IMAGE | LARGE | dict(hidden_sizes=[8, 12], depths=[2, 3], num_stages=2, layer_scale_init_value=1.0),
        picture,
        ["convnext.encoder.stages", "convnext.encoder.stages.0.layers", "convnext.encoder.stages.1.layers"],
    ),
    "resnet": (
        "ResNetForImageClassification",
        IMAGE | dict(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 3], layer_type="basic"),
        picture,
        ["resnet.encoder.stages", "resnet.encoder.stages.0.layers", "resnet.encoder.stages.1.layers"],
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_stages(name: str) -> None:
    kind, settings, example, expected = ENCODERS[name]
    model = build(kind, settings)
    found = stacks(model, example())
    assert [stack.name for stack in found] == expected
    gone = [stack.droppable[-1] for stack in found[-2:]]  # one of each stage, or the last of the only stack
    before = snapshot(model)
    with torch.no_grad(), skipping(model, gone):
        logits = model(**example()).logits
    record = drop_layers_(model, gone, example())
    assert record.config_ok, record.notes
    with torch.no_grad():
        assert torch.equal(model(**example()).logits, logits)
    if "depths" in settings:
        assert [*model.config.depths] == [1, 2]
    record.undo()
    assert snapshot(model) == before


def test_t5_keeps_the_blocks_that_hold_the_position_bias() -> None:
    settings = dict(
        vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_heads=4, pad_token_id=0, eos_token_id=None
    )
    settings |= dict(num_layers=4, num_decoder_layers=4, decoder_start_token_id=0, initializer_factor=4.0)
    model = build("T5ForConditionalGeneration", settings)
    example = ids() | {"decoder_input_ids": ids(1, 5)["input_ids"]}
    encoder, decoder = stacks(model, example)
    assert (encoder.name, decoder.name) == ("encoder.block", "decoder.block")
    for stack in (encoder, decoder):
        assert stack.blocks[0].reason is not None and "later blocks use" in stack.blocks[0].reason
        assert stack.droppable == tuple(f"{stack.name}.{i}" for i in (1, 2, 3))
    with pytest.raises(SelectionError, match=r"encoder\.block\.0 cannot be dropped: .*later blocks use"):
        drop_layers_(model, ["encoder.block.0"], example)
    with pytest.raises(SelectionError, match=r"has encoder\.block, decoder\.block: give names"):
        drop_layers_(model, [1], example)
    gone = ["encoder.block.1", "decoder.block.1", "decoder.block.3"]
    prompt = dict(ids(3, 7), max_new_tokens=6, do_sample=False)
    with torch.no_grad(), skipping(model, gone):
        logits = model(**example).logits
        written = model.generate(**prompt, use_cache=False)
    record = drop_layers_(model, gone, example)
    assert record.config_ok, record.notes
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 2)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (3, 2)
    with torch.no_grad():
        assert torch.equal(model(**example).logits, logits)
        assert torch.equal(model.generate(**prompt, use_cache=False), written)
        assert torch.equal(model.generate(**prompt, use_cache=True), written)


def test_a_configuration_that_cannot_say_it_is_reported() -> None:
    model = build("GPT2LMHeadModel", GPT | dict(scale_attn_by_inverse_layer_idx=True))
    record = drop_layers_(model, [1], ids())
    assert not record.config_ok and "transformer.h.1.attn.scaling" in record.notes[0]
    last = build("GPT2LMHeadModel", GPT | dict(scale_attn_by_inverse_layer_idx=True))
    assert drop_layers_(last, [-1], ids()).config_ok


class BasicBlock(nn.Module):
    """A residual block with a projection where the shape changes, as image networks have it."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Four stages, with the attribute names that users know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, 2), BasicBlock(6, 6, 1))
        self.layer3 = nn.Sequential(BasicBlock(6, 8, 2), BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def test_residual_networks() -> None:
    torch.manual_seed(0)
    for model, x in (
        (ResNet().eval(), torch.randn(2, 3, 8, 8)),
        (ResNet20().eval(), torch.randn(2, 3, 16, 16)),
    ):
        found = stacks(model, x)
        assert len(found) == 3
        first = [stack.blocks[0].reason for stack in found]
        assert first[0] is None and all(r and "changes the hidden state" in r for r in first[1:])
        gone = [found[0].droppable[0], found[2].droppable[0]]
        with torch.no_grad(), skipping(model, gone):
            expected = model(x)
        record = drop_layers_(model, gone, x)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert not record.config_ok and "no configuration" in record.notes[0]
        record.undo()
        with pytest.raises(SelectionError, match="cannot be dropped: changes the hidden state"):
            drop_layers_(model, [found[1].blocks[0].name], x)


def encoder(layers: int = 4) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), layers)


def test_transformer_encoder_of_torch() -> None:
    model, x = encoder().eval(), torch.randn(2, 5, 8)
    for p in model.parameters():  # clones of one layer
        nn.init.normal_(p, std=0.5)
    with torch.no_grad(), skipping(model, ["layers.2"]):
        expected = model(x)
    drop_layers_(model, [2], x)
    assert model.num_layers == 3 == len(model.layers)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


class Odd(nn.Module):
    """Lists of blocks that are no stacks, or only half."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(Residual(i) for i in range(4))
        self.depth = 4
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(4))
        for i, norm in enumerate(self.norms):
            nn.init.constant_(norm.weight, i + 1.0)
        if how == "registered":
            self.favourite = self.blocks[2]

    def forward(self, x: Tensor) -> Tensor:
        blocks = [*self.blocks]
        if self.how == "parallel":
            return sum((block(x) for block in blocks), x)
        if self.how == "unrolled":
            x = self.blocks[0](x)
            return self.blocks[1](x)
        if self.how == "twice":
            blocks = blocks * 2
        if self.how == "backwards":
            blocks = blocks[::-1]
        if self.how == "counted":
            blocks = [self.blocks[i] for i in range(self.depth)]
        for i, block in enumerate(blocks):
            x = block(x)
            if self.how == "between":
                x = self.norms[i](x)
        if self.how == "by number":
            return x * len(self.blocks)
        if self.how == "fixed":
            return x + self.blocks[3].linear(x)
        return x


class Residual(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.block_id = i + 1
        self.dilation = i + 1
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)) * self.dilation


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(self.norm(x)))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("parallel", "what it returns is not what the next block receives"),
        ("unrolled", "called from a line of its own"),
        ("twice", "called 2 times in a forward pass"),
        ("backwards", "does not run one after the other|not one after the other, in its order"),
        ("between", "what it returns is not what the next block receives"),
    ],
)
def test_what_is_no_stack_is_refused_with_the_reason(how: str, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason):
        stacks(Odd(how), torch.ones(2, 4))


def test_what_depends_on_the_number_of_blocks_is_refused_and_left_as_it_was() -> None:
    for how, why in (("by number", "its output differs by"), ("fixed", "fails .IndexError")):
        model, x = Odd(how), torch.randn(2, 4)
        before = snapshot(model)
        with pytest.raises(SelectionError, match=why):
            drop_layers_(model, [1], x.clone())
        assert snapshot(model) == before
    registered = Odd("registered")
    with pytest.raises(SelectionError, match=r"blocks\.2 cannot be dropped: registered .* second time"):
        drop_layers_(registered, [2], torch.ones(2, 4))


def test_numbers_are_renumbered_by_value_and_only_if_their_name_says_so() -> None:
    model, x = Odd("counted"), torch.randn(2, 4)
    with torch.no_grad(), skipping(model, []):
        expected = copy.deepcopy(model)
        expected.blocks = nn.ModuleList([expected.blocks[i] for i in (0, 3)])
        expected.depth = 2
        y = expected(x.clone())
    record = drop_layers_(model, ["blocks.1", "blocks.2"], x.clone())
    assert model.depth == 2 and [b.block_id for b in model.blocks] == [1, 2]
    assert [b.dilation for b in model.blocks] == [1, 4]  # part of the function
    assert any("blocks.*.dilation counts along the blocks" in note for note in record.notes)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), y)


def test_blocks_that_change_their_input_in_place() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(InPlace(i) for i in range(3))), torch.randn(2, 4)
    with torch.no_grad():
        expected = model[2](model[0](x.clone()))
        states = [x.clone()]
        for block in model:
            states.append(block(states[-1].clone()))
    cosines = [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(states)]
    scores = block_influence(model, [x.clone()])
    assert [*scores.values()] == pytest.approx([1 - c for c in cosines], rel=1e-5)
    drop_layers_(model, [1], x)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), expected)


def test_bad_requests_name_what_is_wrong() -> None:
    model, x = encoder(3), torch.ones(1, 5, 8)
    for which, message in (
        ([], "No blocks to drop"),
        (["layers.7"], r"no block 'layers\.7'; the stacks of this model are: layers"),
        ([3], "no block 3 in layers, which has 3"),
        ([1, "layers.1"], "given twice"),
        ([0, 1, 2], "Nothing of layers would be left"),
    ):
        with pytest.raises(SelectionError, match=message):
            drop_layers_(model, which, x)
    with pytest.raises(SelectionError, match="no list of at least two blocks"):
        stacks(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(SelectionError, match=r"has no stack of blocks .* at least two blocks"):
        drop_layers_(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [0], torch.ones(1, 3))


def test_a_record_is_replayed_on_a_fresh_model_even_without_weights() -> None:
    for name in ("gemma2", "gpt2"):
        model = decoder(name)
        record = drop_layers_(model, [0, 2], ids())
        data = json.loads(json.dumps(record.to_dict()))
        fresh = decoder(name)
        again = replay_(fresh, data)
        assert again.dropped == record.dropped and again.origin == record.origin and again.config_ok
        assert again.changes == type(record.changes).from_dict(data["changes"])
        assert json.loads(json.dumps(again.to_dict())) == data
        with torch.no_grad():
            assert torch.equal(fresh(**ids()).logits, model(**ids()).logits)
        with torch.device("meta"):
            empty = decoder(name)
        replay_(empty, data)
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (empty, model)]
        assert shapes[0] == shapes[1]
        before = snapshot(fresh)
        with pytest.raises(SelectionError, match="as recorded"):
            replay_(fresh, data)
        assert snapshot(fresh) == before


@dataclass
class Settings:
    n_layer: int = 4
    width: int = 4
    block_size: int = 4


class Plain(nn.Module):
    """A model with a configuration of its own, two fields of which are four like the number of blocks."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config = config
        self.block_size = config.block_size
        self.places = nn.Parameter(torch.randn(config.block_size, config.width))
        self.blocks = nn.ModuleList(InPlace(i) for i in range(config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places
        for i in range(self.config.n_layer):
            x = self.blocks[i](x)
        return x


@settings(max_examples=25)
@given(st.sets(st.integers(0, 3), min_size=1, max_size=3))
def test_every_subset_of_blocks(gone: set[int]) -> None:
    torch.manual_seed(0)
    model, x = Plain(Settings()), torch.randn(2, 4, 4)
    with torch.no_grad():
        expected = x + model.places
        for i in sorted({*range(4)} - gone):
            expected = model.blocks[i](expected)
    before = snapshot(model)
    record = drop_layers_(model, gone, x)
    assert (model.config.n_layer, model.config.block_size, model.block_size) == (4 - len(gone), 4, 4)
    assert model.config.width == 4 and [*model.blocks._modules] == [str(i) for i in range(4 - len(gone))]
    assert [record.origin[f"blocks.{i}"] for i in range(4 - len(gone))] == [
        f"blocks.{i}" for i in sorted({*range(4)} - gone)
    ]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    again = Plain(Settings())
    replay_(again, json.loads(json.dumps(record.to_dict())))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), expected)
    record.undo()
    assert snapshot(model) == before


def test_outer_and_inner_stacks_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(*(Residual(i) for i in range(3))) for _ in range(3)))
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model[2][2](model[2][0](model[1](x)))
    record = drop_layers_(model, ["0", "2.1"], x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert record.origin == {"0": "1", "1": "2", "1.0": "2.0", "1.1": "2.2"}
    data = json.loads(json.dumps(record.to_dict()))
    record.undo()
    assert [len(stage) for stage in model] == [3, 3, 3]
    replay_(model, data)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with pytest.raises(SelectionError, match=r"1\.1 lies in 1, which is dropped too"):
        drop_layers_(model, ["1", "1.1"], x)


def test_damaged_records_are_refused() -> None:
    model = encoder(3)
    data = drop_layers_(encoder(3), [1], torch.ones(1, 5, 8)).to_dict()
    for broken in ({}, {"changes": {"format": "other"}}, {"changes": data["changes"] | {"cuts": [{}]}}):
        with pytest.raises(ArtifactError):
            replay_(model, broken)
    for kept in ([], [2, 1], [0, 3], [-1, 0]):
        bad = copy.deepcopy(data)
        bad["changes"]["cuts"][0]["kept"] = kept
        with pytest.raises(ArtifactError, match="damaged"):
            replay_(model, bad)
    edit = {"module": "layers.0", "path": ["layer_idx"], "old": 1, "new": 0}
    for entry in (
        {"path": []},
        {"path": ["__class__", "x"]},
        {"path": [0]},
        {"new": {"x": 1}},
        {"module": 3},
    ):
        bad = copy.deepcopy(data)
        bad["changes"]["edits"] = [edit | entry]
        with pytest.raises(ArtifactError, match="damaged"):
            replay_(model, bad)
    for entry in ({"stack": 1}, {"length": "3"}, {"kept": [0.0, 1]}):
        bad = copy.deepcopy(data)
        bad["changes"]["cuts"][0] |= entry
        with pytest.raises(ArtifactError, match="damaged"):
            replay_(model, bad)
    other = copy.deepcopy(data)
    other["changes"]["cuts"][0]["stack"] = "blocks"
    with pytest.raises(SelectionError, match="no module 'blocks'"):
        replay_(model, other)
    assert len(model.layers) == 3


def test_undo_works_once_and_not_after_other_changes() -> None:
    model, x = encoder(4), torch.ones(1, 5, 8)
    first = drop_layers_(model, [1], x)
    second = drop_layers_(model, [0], x)
    with pytest.raises(SelectionError, match="layers was changed"):
        first.undo()
    second.undo()
    first.undo()
    assert len(model.layers) == 4 == model.num_layers
    with pytest.raises(SelectionError, match="put back before"):
        first.undo()


def test_the_optimizer_forgets_dropped_blocks_and_trains_on() -> None:
    model, x = encoder(3), torch.randn(2, 5, 8)
    gone = [*model.layers[1].parameters()]
    half = len(gone) // 2
    rest = [p for p in model.parameters() if not any(p is g for g in gone)]
    groups = [{"params": rest + gone[:half]}, {"params": gone[half:], "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    before = optimizer.state_dict()
    record = drop_layers_(model, ["layers.1"], x, optimizer=optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert len(optimizer.param_groups) == 2 and set(optimizer.state) == set(trained)
    assert record.parameters == sum(p.numel() for p in gone)
    record.undo()
    assert str(optimizer.state_dict()) == str(before)
    drop_layers_(model, ["layers.1"], x, optimizer=optimizer)
    model(x).square().mean().backward()
    optimizer.step()
    stranger = torch.optim.SGD(encoder(2).parameters(), lr=0.1)
    with pytest.raises(SelectionError, match="optimizer of this model"):
        drop_layers_(model, [0], x, optimizer=stranger)
    assert len(model.layers) == 2


def hidden_states(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Before each block of a decoder, and after the last."""
    states: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, out: states.extend((a[0], out)))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [*states[::2], states[-1]]


def test_block_influence_is_one_minus_the_mean_cosine_over_tokens_that_are_no_padding() -> None:
    model = decoder("llama")
    batches = [ids(0, 9), ids(1, 5)]
    batches[1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    cosines: list[list[Tensor]] = [[] for _ in range(4)]
    for batch in batches:
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for i, (a, b) in enumerate(pairwise(hidden_states(model, batch))):
            cosines[i].append(F.cosine_similarity(a.double(), b.double(), dim=-1)[real])
    expected = {f"model.layers.{i}": 1 - float(torch.cat(c).mean()) for i, c in enumerate(cosines)}
    assert block_influence(model, batches) == pytest.approx(expected, rel=1e-9)
    split = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(2)]
    assert block_influence(model, split) == pytest.approx(expected, rel=1e-5)


def test_channels_of_pictures_and_zero_vectors() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack((x[:, 0], -x[:, 1]), 1)  # turns (a, b) to (a, -b)

    model = nn.Sequential(Half(), Half())
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 0, 0] = 1.0  # cosine 1
    x[0, 1, 1, 1] = 1.0  # cosine -1
    x[0, :, 2, 2] = 1.0  # cosine 0; thirteen zero vectors stay zero: cosine 1
    assert block_influence(model, [x]) == pytest.approx({"0": 3 / 16, "1": 3 / 16})
    angles = angular_distance(model, [x], 1, tokens="all")
    assert angles == pytest.approx({("0",): 1.5 / 16, ("1",): 1.5 / 16})
    assert angular_distance(model, [x], 2, tokens="all") == pytest.approx({("0", "1"): 0.0}, abs=1e-6)
    with pytest.raises(StatsError, match="no last token"):
        angular_distance(model, [x], 1)
    with pytest.raises(NonFiniteError, match="not finite"):
        block_influence(model, [x * math.nan], stacks=stacks(model, x))


def test_decoder_blocks_have_the_decoders_padding() -> None:
    settings = dict(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_heads=4, num_layers=2, pad_token_id=0)
    model = build("T5ForConditionalGeneration", settings | dict(decoder_start_token_id=0))
    batch = ids(0, 5) | {"decoder_input_ids": ids(1, 5)["input_ids"]}
    padded = batch | {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 2)}
    padded["decoder_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    short = {k: (v[:, :3] if k == "input_ids" else v) for k, v in batch.items()}
    got, expected = block_influence(model, [padded]), block_influence(model, [short])
    assert got == pytest.approx(expected, rel=1e-4)


def test_angular_distance_is_between_the_ends_of_a_run_at_the_last_token() -> None:
    model = decoder("llama")
    batch = ids(0, 6) | {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])}
    hidden = hidden_states(model, batch)
    last = [h[[0, 1], [3, 5]].double() for h in hidden]
    for n in (1, 2, 4):
        got = angular_distance(model, [batch], n)
        for start in range(5 - n):
            names = tuple(f"model.layers.{i}" for i in range(start, start + n))
            angle = F.cosine_similarity(last[start], last[start + n], dim=-1).arccos() / math.pi
            assert got.pop(names) == pytest.approx(float(angle.mean()), rel=1e-9)
        assert not got
    for n in (0, 5):
        with pytest.raises(SelectionError, match=f"No stack has {n} blocks in a row"):
            angular_distance(model, [batch], n)


def test_loss_increase_is_the_loss_with_one_block_bypassed_minus_the_dense_one() -> None:
    torch.manual_seed(0)
    model = ResNet().eval()
    data = [(torch.randn(n, 3, 8, 8), torch.randint(5, (n,))) for n in (4, 2)]
    modes = [m.training for m in model.train().modules()]
    got = loss_increase(model, data, F.cross_entropy)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        dense = F.cross_entropy(model(x), y)
        for name, value in got.items():
            with skipping(model, [name]):
                assert value == pytest.approx(float(F.cross_entropy(model(x), y) - dense), abs=1e-6)
    assert list(got) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer3.2"]
    own = decoder("llama")
    batch = ids() | {"labels": ids()["input_ids"]}
    assert len(loss_increase(own, [batch])) == 4


def test_choices_by_position_and_by_score() -> None:
    stack = Stack("h", tuple(Block(f"h.{i}", "B", 1, "no" if i == 2 else None) for i in range(6)))
    assert first_blocks(stack, 3) == ("h.0", "h.1", "h.3")
    assert last_blocks(stack, 2) == ("h.4", "h.5")
    assert every_other(stack) == ("h.1", "h.3", "h.5")
    assert every_other(stack, keep="odd") == ("h.0", "h.4")
    assert lowest({"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}, 3) == ("b", "c", "d")
    assert lowest({"a": 1.0, "b": 1.0}, 1) == ("b",)
    for bad in (
        lambda: first_blocks(stack, 6),
        lambda: last_blocks(stack, 0),
        lambda: lowest({"a": 1.0}, 2),
        lambda: lowest({"a": math.nan}, 1),
    ):
        with pytest.raises(SecateurError):
            bad()


@pytest.mark.realdata("stories260k")
def test_stories260k_without_its_least_influential_block() -> None:
    model = realdata.stories260k()
    texts = realdata.stories(0, 8)
    tokenizer = realdata.root.tokenizer("stories260k")
    batches = [{"input_ids": torch.tensor([tokenizer.encode(t)[:64]])} for t in texts]
    scores = block_influence(model, batches)
    assert len(scores) == 5
    labelled = [b | {"labels": b["input_ids"]} for b in batches]
    harm = loss_increase(model, labelled)
    assert min(harm.values()) > 0  # every block of a trained model helps
    [least] = lowest(harm, 1)
    with torch.no_grad():
        dense = torch.stack([model(**b).loss for b in labelled]).mean()
        record = drop_layers_(model, [least], batches[0])
        loss = torch.stack([model(**b).loss for b in labelled]).mean()
    assert float(loss - dense) == pytest.approx(harm[least], rel=1e-4)
    assert record.config_ok
    prompt = dict(input_ids=batches[0]["input_ids"][:, :8], max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**prompt, use_cache=True), model.generate(**prompt, use_cache=False))


@pytest.mark.realdata("minilm_l6")
def test_minilm_without_every_other_block(tmp_path: Path) -> None:
    model = realdata.minilm()
    example = {"input_ids": torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])}
    [stack] = stacks(model, example)
    gone = every_other(stack)
    with torch.no_grad(), skipping(model, gone):
        expected = model(**example).last_hidden_state
    record = drop_layers_(model, gone, example)
    assert record.config_ok and len(record.origin) == 3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**example).last_hidden_state, expected)
        assert torch.equal(loaded(**example).last_hidden_state, expected)
