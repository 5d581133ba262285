"""Which weights are pruned by default, what is left alone and why, and how to ask for something else."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import secateur as sc
from secateur.core.errors import SelectionError
from secateur.core.layout import Plain, Transposed
from secateur.core.names import Where, select, unwrap

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = SMALL | dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def names(model: nn.Module, where: Where | None = None) -> list[str]:
    return [t.name for t in select(model, where).targets]


def reasons(model: nn.Module, where: Where | None = None) -> dict[str, str]:
    return dict(select(model, where).skipped)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(8, 5)
    )


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, bidirectional=True, proj_size=3)
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm(6)
        self.position = nn.Parameter(torch.ones(4, 6))
        self.out = nn.Linear(6, 7)


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 9, bias=False)
        self.words.weight = self.head.weight


class Around(nn.Module):
    """Something of one's own around an encoder."""

    def __init__(self, encoder: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        for name, module in more.items():
            if name.startswith("before"):
                self.add_module(name, module)
        self.encoder = encoder
        for name, module in more.items():
            if not name.startswith("before"):
                self.add_module(name, module)


# ------ plain torch models


def test_the_last_layer_of_a_torch_model_is_its_head():
    assert names(convnet()) == ["0.weight", "2.weight"]
    assert reasons(convnet()) == {"4.weight": "part of the output head"}


def test_recurrent_and_attention_weights_are_selected_embeddings_norms_and_biases_are_not():
    assert names(Tagger()) == [
        *(f"lstm.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")),
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert reasons(Tagger()) == {
        "position": "a raw parameter of Tagger, whose role is unknown",
        "words.weight": "an embedding",
        "out.weight": "part of the output head",
    }


def test_attention_of_unlike_widths_has_three_matrices():
    model = nn.Sequential(nn.MultiheadAttention(4, 1, kdim=6, vdim=2), nn.Linear(4, 4))
    assert names(model) == [
        f"0.{n}" for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    ]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
def test_a_model_of_one_weight_has_no_head(model):
    assert len(names(model)) == 1


def test_a_recurrent_layer_at_the_end_is_no_head():
    assert names(nn.LSTM(3, 4)) == ["weight_ih_l0", "weight_hh_l0"]
    assert len(names(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)))) == 3


def test_a_head_that_is_tied_to_the_embedding_does_not_cost_a_body_layer():
    model = TiedLanguageModel()
    assert names(model) == ["block.0.weight", "block.2.weight"]
    assert reasons(model) == {"words.weight": "an embedding"}


def test_tied_weights_count_once_and_go_by_any_of_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert names(model) == ["0.weight"]
    assert names(model, Where(include="1")) == ["0.weight"]
    with pytest.raises(SelectionError, match="Nothing to prune"):
        names(model, Where(exclude="1.weight"))
    assert names(TiedLanguageModel(), Where(also="head")) == [
        "words.weight",
        "block.0.weight",
        "block.2.weight",
    ]


def test_a_linear_layer_that_shares_an_embedding_is_left_alone_whichever_comes_first():
    model = nn.Sequential(nn.Linear(4, 9, bias=False), nn.Linear(9, 4), nn.Embedding(9, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert names(model) == ["1.weight"]
    assert reasons(model)["0.weight"] == "shared with 2.weight: an embedding"


def test_one_module_registered_twice_counts_once():
    shared = nn.Linear(4, 4)
    assert names(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))) == ["0.weight"]


# ------ asking for something else


def test_include_and_exclude_compare_names_of_parameters_and_modules():
    model = nn.ModuleDict(
        {n: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for n in ("body", "tail", "end")}
    )
    assert names(model, Where(include="body*")) == ["body.0.weight", "body.1.weight"]
    assert names(model, Where(include=("body.0", "tail.1.weight"))) == ["body.0.weight", "tail.1.weight"]
    assert names(model, Where(exclude=("*.0", "body.*"))) == ["tail.1.weight"]
    assert names(model, Where(include="*.0", exclude="tail.*")) == ["body.0.weight", "end.0.weight"]
    skipped = reasons(model, Where(include="*.0", exclude="tail.*"))
    assert skipped["body.1.weight"] == "not in include='*.0'"
    assert skipped["tail.0.weight"] == "in exclude='tail.*'"
    assert skipped["end.1.weight"] == "part of the output head"


def test_include_alone_does_not_open_what_is_left_alone():
    with pytest.raises(SelectionError, match=r"4\.weight: part of the output head.*Where\(also"):
        names(convnet(), Where(include="4"))


def test_also_adds_whatever_its_role():
    model = Tagger()
    where = Where(include="lstm", also=("out", "words", "norm.weight", "out.bias", "position"))
    assert names(model, where)[:4] == ["position", "words.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert names(model, where)[-3:] == ["norm.weight", "out.weight", "out.bias"]
    for target in select(model, where).targets:
        assert target.matrix.numel() == target.shape.numel() == target.weight.numel()


def test_also_beats_exclude():
    assert names(convnet(), Where(exclude="*", also="4.weight")) == ["4.weight"]


@pytest.mark.parametrize("label", ["include", "exclude", "also"])
def test_a_glob_that_matches_nothing_says_what_comes_close(label):
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    with pytest.raises(SelectionError) as caught:
        select(model, Where(**{label: ("encoder", "decodr.weight")}))
    assert str(caught.value).startswith(
        f"{label}='decodr.weight' matches no parameter of the model. Close names: "
    )
    assert "decoder.weight" in str(caught.value)


# ------ what cannot be pruned


def test_weights_that_are_computed_from_others_are_skipped_even_if_asked():
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("pruned", "parametrized", "normed", "plain", "head")})
    prune.random_unstructured(model["pruned"], "weight", 0.5)
    parametrizations.weight_norm(model["parametrized"])
    torch.nn.utils.spectral_norm(model["normed"])
    assert names(model) == ["plain.weight"]
    assert reasons(model) == {
        "pruned.weight_orig": "already pruned by torch.nn.utils.prune: call its remove() first",
        "parametrized.parametrizations.weight.original0": "computed by a parametrization: remove it first",
        "parametrized.parametrizations.weight.original1": "computed by a parametrization: remove it first",
        "normed.weight_orig": "weight is computed from it by weight or spectral norm: remove that first",
        "head.weight": "part of the output head",
    }
    assert names(model, Where(include="plain", also=("pruned*", "normed*", "parametrized*"))) == [
        "pruned.bias",
        "parametrized.bias",
        "normed.bias",
        "plain.weight",
    ]


def test_the_old_weight_norm_is_seen_too():
    with pytest.warns(FutureWarning):
        layer = weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Linear(4, 4), nn.Linear(4, 4))
    assert names(model) == ["1.weight"]
    assert {"0.weight_g", "0.weight_v"} <= reasons(model).keys()


def test_what_holds_no_floating_point_values_is_skipped_even_if_asked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model.waves = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    model.empty = nn.Parameter(torch.ones(4, 0))
    model.eighth = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn))
    assert names(model, Where(also=("codes", "waves", "empty", "eighth"))) == ["0.weight"]
    assert reasons(model)["empty"] == "empty"
    assert "torch.int8" in reasons(model)["codes"]
    assert "torch.float8_e4m3fn" in reasons(model)["eighth"]


def test_weights_without_values_are_refused():
    with pytest.raises(SelectionError, match=r"1\.weight has no values yet"):
        select(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(SelectionError, match=r"0\.weight has no values yet"):
        select(nn.Sequential(nn.Linear(2, 2, device="meta")))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.Embedding(3, 3), nn.LayerNorm(3)])
def test_nothing_to_prune_is_an_error(model):
    with pytest.raises(SelectionError, match=r"Nothing to prune is selected|matches no parameter"):
        select(model)


# ------ wrappers


def test_names_are_those_inside_compile_and_data_parallel_wrappers():
    model = convnet()
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model), backend="eager"),
    ):
        assert unwrap(wrapped) is model
        assert names(wrapped) == ["0.weight", "2.weight"]


def test_names_are_those_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = convnet()
        assert names(nn.parallel.DistributedDataParallel(model)) == ["0.weight", "2.weight"]
    finally:
        torch.distributed.destroy_process_group()


# ------ transformers


def llama(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT | dict(num_key_value_heads=1) | changes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = dict(vocab_size=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **special))


def bert(kind: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(**TEXT, max_position_embeddings=16)
    return getattr(transformers, kind)(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4))


def t5(tied: bool) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=tied, decoder_start_token_id=0))


LLAMA_LAYER = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
BERT_LAYER = [f"attention.self.{x}" for x in ("query", "key", "value")]
BERT_LAYER += ["attention.output.dense", "intermediate.dense", "output.dense"]


def stack(prefix: str, layer: list[str]) -> list[str]:
    return [f"{prefix}.{i}.{name}.weight" for i in range(2) for name in layer]


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    model = llama(tie_word_embeddings=tied)
    assert names(model) == stack("model.layers", LLAMA_LAYER)
    left_alone = {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "part of the output head"}
    if tied:
        del left_alone["lm_head.weight"]
    assert reasons(model) == left_alone
    assert names(model.model) == stack("layers", LLAMA_LAYER)  # a base model has no head
    assert len(names(model, Where(also="lm_head"))) == len(names(model)) + 1


def test_gpt2_is_seen_transposed():
    model = gpt2()
    layer = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names(model) == stack("transformer.h", layer)
    for target in select(model).targets:
        assert target.layout == Transposed()
        assert target.shape == target.weight.shape[::-1]


def test_bert_with_and_without_heads():
    body = stack("encoder.layer", BERT_LAYER)
    assert names(bert("BertModel")) == [*body, "pooler.dense.weight"]
    prefixed = [f"bert.{n}" for n in body]
    classifier = bert("BertForSequenceClassification")
    assert names(classifier) == [*prefixed, "bert.pooler.dense.weight"]
    assert reasons(classifier)["classifier.weight"] == "part of the output head"
    masked = bert("BertForMaskedLM")  # its decoder is tied to the embedding
    assert names(masked) == prefixed
    assert reasons(masked)["cls.predictions.transform.dense.weight"] == "part of the output head"


def test_vit():
    model = vit()
    selected = names(model)
    assert "vit.embeddings.patch_embeddings.projection.weight" in selected
    assert len(selected) == 1 + 2 * 6
    assert reasons(model)["classifier.weight"] == "part of the output head"
    assert "unknown" in reasons(model)["vit.embeddings.position_embeddings"]


@pytest.mark.parametrize("tied", [False, True])
def test_t5(tied):
    selected = names(t5(tied))
    assert len(selected) == 2 * 6 + 2 * 10
    assert all(n.startswith(("encoder.block.", "decoder.block.")) for n in selected)
    assert not any("relative_attention_bias" in n for n in selected)


def test_experts_are_left_alone_with_a_reason_and_can_be_asked_for():
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    experts = dict(num_key_value_heads=1, num_local_experts=3)
    mixtral = MixtralForCausalLM(MixtralConfig(**TEXT, **experts))
    oss = GptOssForCausalLM(GptOssConfig(**TEXT, **experts, head_dim=8))
    for model, layout, kind in ((mixtral, Plain(), "Mixtral"), (oss, Transposed(), "GptOss")):
        assert names(model) == stack("model.layers", LLAMA_LAYER[:4])
        skipped = reasons(model)
        assert skipped["model.layers.0.mlp.experts.down_proj"].startswith(f"a raw parameter of {kind}Experts")
        asked = select(model, Where(include="*q_proj", also="*.experts.*_proj")).targets
        stacks = {t.name: t for t in asked if "experts" in t.name}
        assert len(stacks) == 4
        down = stacks["model.layers.1.mlp.experts.down_proj"]
        assert down.layout == layout
        assert down.shape == (3 * 16, 24)  # a row for each output of each expert
        assert down.run == 24


def test_the_rows_of_transposed_experts_are_their_outputs():
    down = torch.randn(2, 5, 3)  # experts, inputs, outputs
    x = torch.randn(2, 4, 5)
    rows = Transposed().matrix(down).view(2, 3, 5)
    torch.testing.assert_close(torch.einsum("eti,eoi->eto", x, rows), x @ down)
    assert torch.equal(Transposed().restore(rows.reshape(6, 5), down.shape), down)


def test_a_model_of_ones_own_around_an_encoder_loses_no_body_layer():
    encoder = bert("BertModel")
    body = [f"encoder.{n}" for n in names(encoder)]
    assert names(Around(encoder)) == body
    assert names(Around(encoder, before=nn.Linear(3, 16))) == ["before.weight", *body]
    with_head = Around(encoder, hidden=nn.Linear(16, 8), head=nn.Linear(8, 3))
    assert names(with_head) == [*body, "hidden.weight"]
    assert reasons(with_head)["head.weight"] == "part of the output head"


def test_a_model_with_a_head_inside_another_keeps_its_head():
    inner = bert("BertForSequenceClassification")
    model = Around(inner, scale=nn.Linear(2, 2))
    assert names(model) == [f"encoder.{n}" for n in names(inner)]
    assert {"encoder.classifier.weight", "scale.weight"} <= reasons(model).keys()


def test_of_nested_models_that_declare_a_head_the_outer_one_counts():
    class Declaring(nn.Module):
        base_model_prefix = "base"

        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.last = nn.Linear(3, 3)

    model = Declaring(Declaring(nn.Linear(3, 3)))
    assert names(model) == ["base.base.weight", "base.last.weight"]
    assert reasons(model) == {"last.weight": "part of the output head"}


@pytest.mark.parametrize(
    "make", [llama, gpt2, vit, lambda: t5(True), lambda: bert("BertForMaskedLM"), Tagger, convnet]
)
def test_no_norm_bias_embedding_or_output_is_ever_selected(make):
    model = make()
    untouched = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    untouched |= {id(p) for p in model.parameters() if p.dim() < 2}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    untouched |= {id(p) for p in output.parameters()} if output is not None else set()
    for target in sc.select(model).targets:
        assert id(target.weight) not in untouched, target.name
        assert dict(model.named_parameters())[target.name] is target.weight
