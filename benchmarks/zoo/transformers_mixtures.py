"""Tiny decoders of transformers with experts, state spaces, linear recurrences, and mixtures of these."""

from __future__ import annotations

from benchmarks.zoo.tiny import Tiny, long_text, tiny
from benchmarks.zoo.transformers_decoders import COMMON, GQA, GQA_WIDE, HALF_ROTARY, LATENT, MHA

MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
MOE_NAMED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
MOE_ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

EXPERTS = {
    "mixtral": tiny("MixtralForCausalLM", GQA, MOE),
    "qwen2_moe": tiny(
        "Qwen2MoeForCausalLM", GQA_WIDE, MOE_NAMED, shared_expert_intermediate_size=44, decoder_sparse_step=1
    ),
    "qwen3_moe": tiny("Qwen3MoeForCausalLM", GQA, MOE_NAMED),
    "qwen3_next": tiny(
        "Qwen3NextForCausalLM",
        HALF_ROTARY,
        MOE_NAMED,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=44,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=10,
        linear_value_head_dim=14,
    ),
    "olmoe": tiny("OlmoeForCausalLM", GQA_WIDE, num_experts=6, num_experts_per_tok=2),
    "flex_olmo": tiny("FlexOlmoForCausalLM", GQA_WIDE, num_experts=6, num_experts_per_tok=2),
    "granitemoe": tiny("GraniteMoeForCausalLM", GQA_WIDE, MOE),
    "granitemoeshared": tiny("GraniteMoeSharedForCausalLM", GQA_WIDE, MOE, shared_intermediate_size=44),
    "deepseek_v2": tiny("DeepseekV2ForCausalLM", GQA, LATENT, MOE_ROUTED, head_dim=8),
    "deepseek_v3": tiny("DeepseekV3ForCausalLM", GQA, LATENT, MOE_ROUTED, head_dim=8),
    "gpt_oss": tiny("GptOssForCausalLM", GQA, MOE, sliding_window=8),
    "phimoe": tiny("PhimoeForCausalLM", GQA_WIDE, MOE),
    "minimax": tiny(
        "MiniMaxForCausalLM", GQA, MOE, layer_types=["linear_attention", "full_attention"], block_size=16
    ),
    "dbrx": tiny(
        "DbrxForCausalLM",
        COMMON,
        d_model=192,
        n_heads=16,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 192, "ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 2},
    ),
    "jetmoe": tiny("JetMoeForCausalLM", GQA, MOE, kv_channels=12, num_key_value_heads=4),
    "dots1": tiny("Dots1ForCausalLM", GQA_WIDE, MOE_ROUTED),
    "glm4_moe": tiny("Glm4MoeForCausalLM", HALF_ROTARY, MOE_ROUTED, use_qk_norm=True),
    "hunyuan_v1_moe": tiny("HunYuanMoEV1ForCausalLM", GQA, num_experts=6, moe_topk=2),
    "ernie4_5_moe": tiny(
        "Ernie4_5_MoeForCausalLM",
        GQA_WIDE,
        moe_num_experts=6,
        moe_k=2,
        moe_intermediate_size=40,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "llama4_text": tiny(
        "Llama4ForCausalLM",
        GQA,
        MOE,
        intermediate_size_mlp=100,
        interleave_moe_layer_step=2,
        num_experts_per_tok=1,
    ),
    "longcat_flash": tiny(
        "LongcatFlashForCausalLM",
        GQA,
        LATENT,
        head_dim=8,
        num_layers=2,
        ffn_hidden_size=100,
        expert_ffn_hidden_size=40,
        n_routed_experts=6,
        zero_expert_num=2,
        moe_topk=2,
    ),
    "lfm2_moe": tiny(
        "Lfm2MoeForCausalLM", GQA_WIDE, MOE_NAMED, layer_types=["conv", "full_attention"], num_dense_layers=1
    ),
}

MAMBA2 = {
    "mamba_n_heads": 16,
    "mamba_d_head": 24,
    "mamba_n_groups": 4,
    "mamba_d_state": 10,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

STATES = {
    "mamba": tiny(
        "MambaForCausalLM", COMMON, hidden_size=64, state_size=10, num_hidden_layers=2, time_step_rank=6
    ),
    "falcon_mamba": tiny(
        "FalconMambaForCausalLM", COMMON, hidden_size=64, state_size=10, num_hidden_layers=2, time_step_rank=6
    ),
    "mamba2": tiny(
        "Mamba2ForCausalLM",
        COMMON,
        hidden_size=96,
        num_hidden_layers=2,
        num_heads=16,
        head_dim=12,
        state_size=10,
        n_groups=4,
        chunk_size=8,
    ),
    "rwkv": tiny(
        "RwkvForCausalLM",
        COMMON,
        hidden_size=64,
        num_hidden_layers=2,
        attention_hidden_size=96,
        intermediate_size=160,
        context_length=64,
    ),
    "xlstm": tiny(
        "xLSTMForCausalLM",
        COMMON,
        hidden_size=96,
        num_hidden_layers=2,
        num_heads=8,
        chunk_size=16,
        mode="train",
        inputs=long_text,
    ),
    "recurrent_gemma": tiny(
        "RecurrentGemmaForCausalLM",
        MHA,
        num_hidden_layers=3,
        num_key_value_heads=4,
        lru_width=112,
        intermediate_size=160,
        attention_window_size=8,
    ),
    "jamba": tiny(
        "JambaForCausalLM",
        GQA_WIDE,
        num_experts=6,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=10,
        mamba_dt_rank=6,
        use_mamba_kernels=False,
    ),
    "bamba": tiny(
        "BambaForCausalLM", HALF_ROTARY, MAMBA2, hidden_size=192, head_dim=12, attn_layer_indices=[1]
    ),
    "zamba": tiny(
        "ZambaForCausalLM",
        MHA,
        attention_head_dim=24,
        attention_hidden_size=192,
        num_key_value_heads=8,
        num_hidden_layers=3,
        n_mamba_heads=2,
        mamba_d_state=10,
        mamba_dt_rank=6,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        use_mamba_kernels=False,
    ),
    "zamba2": tiny(
        "Zamba2ForCausalLM",
        GQA_WIDE,
        num_key_value_heads=8,
        num_hidden_layers=3,
        n_mamba_heads=16,
        mamba_d_state=10,
        mamba_ngroups=4,
        chunk_size=8,
        adapter_rank=6,
        num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        use_mamba_kernels=False,
    ),
    "nemotron_h": tiny(
        "NemotronHForCausalLM",
        GQA,
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=10,
        n_groups=4,
        ssm_state_size=14,
        chunk_size=8,
        n_routed_experts=6,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=44,
        use_mamba_kernels=False,
    ),
    "falcon_h1": tiny("FalconH1ForCausalLM", GQA_WIDE, MAMBA2, mamba_d_ssm=384),
    "granitemoehybrid": tiny(
        "GraniteMoeHybridForCausalLM",
        GQA_WIDE,
        MAMBA2,
        MOE,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=44,
    ),
    "olmo_hybrid": tiny(
        "OlmoHybridForCausalLM",
        GQA_WIDE,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=10,
        linear_value_head_dim=14,
    ),
    "kimi_linear": tiny(
        "KimiLinearForCausalLM",
        GQA,
        LATENT,
        MOE,
        moe_intermediate_size=40,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        linear_num_heads=8,
        linear_head_dim=10,
    ),
}

MIXTURES: dict[str, Tiny] = EXPERTS | STATES
