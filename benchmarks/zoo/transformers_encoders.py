"""Tiny encoders of transformers."""

from __future__ import annotations

import torch

from benchmarks.zoo.tiny import (
    BATCH,
    VOCABULARY,
    Inputs,
    Tiny,
    first_global,
    long_text,
    renamed,
    text,
    tiny,
    together,
)

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 160,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# XLM's names
XLM = {
    "vocab_size": VOCABULARY,
    "n_words": VOCABULARY,
    "emb_dim": 96,
    "n_layers": 2,
    "n_heads": 8,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "pad_token_id": 0,
    "pad_index": 0,
}


def _entities(generator: torch.Generator) -> Inputs:
    """Three entities and the tokens where each is mentioned, -1 for none."""
    return {
        "entity_ids": torch.randint(8, VOCABULARY, (BATCH, 3), generator=generator),
        "entity_position_ids": torch.tensor([[[1, 2, -1], [4, -1, -1], [6, 7, 8]]] * BATCH),
    }


ENCODERS: dict[str, Tiny] = {
    "bert": tiny("BertForSequenceClassification", BERT),
    "roberta": tiny("RobertaForSequenceClassification", BERT),
    "roberta_prelayernorm": tiny("RobertaPreLayerNormForSequenceClassification", BERT),
    "albert": tiny("AlbertForSequenceClassification", BERT, embedding_size=64),
    "electra": tiny("ElectraForSequenceClassification", BERT, embedding_size=64),
    "deberta": tiny(
        "DebertaForSequenceClassification",
        BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        max_relative_positions=16,
    ),
    "deberta_v2": tiny(
        "DebertaV2ForSequenceClassification",
        BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        max_relative_positions=16,
    ),
    "distilbert": tiny(
        "DistilBertForSequenceClassification", BERT, dim=96, n_layers=2, n_heads=8, hidden_dim=160
    ),
    "mobilebert": tiny(
        "MobileBertForSequenceClassification",
        BERT,
        embedding_size=64,
        intra_bottleneck_size=48,
        num_feedforward_networks=2,
        true_hidden_size=48,
    ),
    "convbert": tiny(
        "ConvBertForSequenceClassification", BERT, embedding_size=64, head_ratio=2, conv_kernel_size=5
    ),
    "squeezebert": tiny("SqueezeBertForSequenceClassification", BERT, embedding_size=96),
    "funnel": tiny(
        "FunnelForTokenClassification",
        {k: v for k, v in BERT.items() if k != "num_hidden_layers"},
        d_model=96,
        n_head=8,
        d_head=10,
        d_inner=160,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    "nystromformer": tiny(
        "NystromformerForSequenceClassification",
        BERT,
        num_landmarks=4,
        segment_means_seq_len=32,
        conv_kernel_size=5,
        inputs=long_text,
    ),
    "longformer": tiny(
        "LongformerForTokenClassification",
        BERT,
        attention_window=[4, 4],
        inputs=together(long_text, first_global),
    ),
    "big_bird": tiny("BigBirdForSequenceClassification", BERT, attention_type="original_full"),
    "modernbert": tiny(
        "ModernBertForSequenceClassification", BERT, local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    "xlm": tiny("XLMForSequenceClassification", XLM),
    "flaubert": tiny("FlaubertForSequenceClassification", XLM),
    "xlm_roberta_xl": tiny("XLMRobertaXLForSequenceClassification", BERT),
    "roformer": tiny("RoFormerForSequenceClassification", BERT, embedding_size=64),
    "rembert": tiny(
        "RemBertForSequenceClassification", BERT, input_embedding_size=64, output_embedding_size=80
    ),
    "mpnet": tiny("MPNetForSequenceClassification", BERT),
    "fnet": tiny("FNetForSequenceClassification", BERT),
    "ibert": tiny("IBertForSequenceClassification", BERT),
    "megatron_bert": tiny("MegatronBertForSequenceClassification", BERT),
    "layoutlm": tiny("LayoutLMForSequenceClassification", BERT, max_2d_position_embeddings=32),
    "yoso": tiny("YosoForSequenceClassification", BERT, use_expectation=True),
    "data2vec_text": tiny("Data2VecTextForSequenceClassification", BERT),
    "esm": tiny(
        "EsmForSequenceClassification",
        BERT,
        position_embedding_type="rotary",
        mask_token_id=3,
        token_dropout=False,
    ),
    "eurobert": tiny(
        "EuroBertForSequenceClassification", BERT, num_key_value_heads=2, head_dim=12, mask_token_id=3
    ),
    "nomic_bert": tiny("NomicBertForSequenceClassification", BERT, head_dim=12),
    "canine": tiny(
        "CanineForSequenceClassification",
        BERT,
        num_hash_buckets=64,
        local_transformer_stride=8,
        inputs=long_text,
    ),
    "xlnet": tiny(
        "XLNetForSequenceClassification",
        {k: v for k, v in BERT.items() if k != "max_position_embeddings"},
        d_model=96,
        n_layer=2,
        n_head=8,
        d_inner=160,
        use_mems_eval=False,
    ),
    "splinter": tiny("SplinterForQuestionAnswering", BERT, question_token_id=3),
    "luke": tiny(
        "LukeForMaskedLM",
        BERT,
        entity_vocab_size=VOCABULARY,
        entity_emb_size=40,
        inputs=together(text, _entities),
    ),
    "roc_bert": tiny(
        "RoCBertForSequenceClassification",
        BERT,
        pronunciation_vocab_size=VOCABULARY,
        shape_vocab_size=VOCABULARY,
        pronunciation_embed_dim=40,
        shape_embed_dim=48,
        inputs=together(text, renamed("input_pronunciation_ids"), renamed("input_shape_ids")),
    ),
    "tapas": tiny("TapasForSequenceClassification", BERT),
    "perceiver": tiny(
        "PerceiverForSequenceClassification",
        BERT,
        num_latents=10,
        d_latents=96,
        d_model=64,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
    ),
}
