"""Tiny decoders of transformers: grouped queries, latent attention, and qkv fused in every layout."""

from __future__ import annotations

from benchmarks.zoo.tiny import VOCABULARY, Tiny, tiny

COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 12,
}
# Where the head dimension follows from the hidden size.
GQA_WIDE = GQA | {"hidden_size": 192}
# Half of each head is rotated: 16 = 8 rotated (4 pairs) + 8 not.
HALF_ROTARY = GQA | {"hidden_size": 256, "head_dim": 16, "partial_rotary_factor": 0.5}
MHA = GQA_WIDE | {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8}
GPT = COMMON | {
    "n_embd": 96,
    "n_layer": 2,
    "n_head": 8,
    "n_inner": 160,
    "n_positions": 64,
    "n_ctx": 64,
}
LATENT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
GROUPED = {
    "llama": tiny("LlamaForCausalLM", GQA),
    "mistral": tiny("MistralForCausalLM", GQA, sliding_window=8),
    "ministral": tiny("MinistralForCausalLM", GQA, sliding_window=8),
    "qwen2": tiny("Qwen2ForCausalLM", GQA_WIDE),
    "qwen3": tiny("Qwen3ForCausalLM", GQA),
    "gemma": tiny("GemmaForCausalLM", GQA),
    "gemma2": tiny("Gemma2ForCausalLM", GQA, sliding_window=8, query_pre_attn_scalar=12),
    "gemma3": tiny("Gemma3ForCausalLM", GQA, sliding_window=8, query_pre_attn_scalar=12),
    "gemma3n": tiny(
        "Gemma3nForCausalLM",
        GQA,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=18,
        laurel_rank=14,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "vaultgemma": tiny("VaultGemmaForCausalLM", GQA, sliding_window=8, query_pre_attn_scalar=12),
    "phi": tiny("PhiForCausalLM", HALF_ROTARY),
    "phi3": tiny("Phi3ForCausalLM", GQA_WIDE, pad_token_id=0),
    "stablelm": tiny("StableLmForCausalLM", HALF_ROTARY, qk_layernorm=True),
    "starcoder2": tiny("Starcoder2ForCausalLM", GQA_WIDE),
    "cohere": tiny("CohereForCausalLM", GQA_WIDE, use_qk_norm=True),
    "cohere2": tiny("Cohere2ForCausalLM", GQA_WIDE, sliding_window=8),
    "olmo": tiny("OlmoForCausalLM", GQA_WIDE),
    "olmo2": tiny("Olmo2ForCausalLM", GQA_WIDE),
    "olmo3": tiny("Olmo3ForCausalLM", GQA_WIDE, sliding_window=8),
    "granite": tiny("GraniteForCausalLM", GQA_WIDE),
    "nemotron": tiny("NemotronForCausalLM", HALF_ROTARY),
    "glm": tiny("GlmForCausalLM", HALF_ROTARY),
    "glm4": tiny("Glm4ForCausalLM", HALF_ROTARY),
    "smollm3": tiny("SmolLM3ForCausalLM", GQA_WIDE, no_rope_layers=[1, 0]),
    "helium": tiny("HeliumForCausalLM", GQA_WIDE),
    "exaone4": tiny("Exaone4ForCausalLM", GQA_WIDE, sliding_window=8, sliding_window_pattern=2),
    "arcee": tiny("ArceeForCausalLM", GQA),
    "apertus": tiny("ApertusForCausalLM", GQA_WIDE),
    "seed_oss": tiny("SeedOssForCausalLM", GQA),
    "ernie4_5": tiny("Ernie4_5ForCausalLM", GQA),
    "hunyuan_v1_dense": tiny("HunYuanDenseV1ForCausalLM", GQA),
    "persimmon": tiny("PersimmonForCausalLM", HALF_ROTARY),
    "diffllama": tiny("DiffLlamaForCausalLM", GQA_WIDE),
    "bitnet": tiny("BitNetForCausalLM", GQA_WIDE),
    "doge": tiny("DogeForCausalLM", GQA_WIDE),
    "nanochat": tiny("NanoChatForCausalLM", GQA_WIDE),
    "minicpm3": tiny("MiniCPM3ForCausalLM", GQA_WIDE, LATENT),
    "modernbert_decoder": tiny("ModernBertDecoderForCausalLM", MHA, local_attention=8),
    "lfm2": tiny(
        "Lfm2ForCausalLM", GQA_WIDE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}

FUSED = {
    "gpt2": tiny("GPT2LMHeadModel", GPT),
    "gpt_bigcode": tiny("GPTBigCodeForCausalLM", GPT),
    "gpt_neo": tiny(
        "GPTNeoForCausalLM",
        COMMON,
        hidden_size=96,
        num_layers=2,
        num_heads=8,
        intermediate_size=160,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "gpt_neox": tiny("GPTNeoXForCausalLM", HALF_ROTARY, rotary_pct=0.5),
    "gpt_neox_japanese": tiny(
        "GPTNeoXJapaneseForCausalLM", HALF_ROTARY, rotary_pct=0.5, intermediate_multiple_size=2
    ),
    "gptj": tiny("GPTJForCausalLM", GPT, n_embd=128, rotary_dim=8),
    "codegen": tiny("CodeGenForCausalLM", GPT, n_embd=128, rotary_dim=8),
    "bloom": tiny("BloomForCausalLM", COMMON, hidden_size=96, n_layer=2, n_head=8),
    "falcon": tiny(
        "FalconForCausalLM",
        COMMON,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_kv_heads=4,
        ffn_hidden_size=160,
        new_decoder_architecture=True,
    ),
    "falcon_mqa": tiny(
        "FalconForCausalLM",
        COMMON,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        ffn_hidden_size=160,
        multi_query=True,
        alibi=False,
    ),
    "mpt": tiny(
        "MptForCausalLM", COMMON, d_model=96, n_heads=8, n_layers=2, expansion_ratio=2, max_seq_len=64
    ),
    "opt": tiny(
        "OPTForCausalLM",
        COMMON,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        ffn_dim=160,
        word_embed_proj_dim=64,
    ),
    "ctrl": tiny("CTRLLMHeadModel", GPT, dff=160),
    "openai_gpt": tiny("OpenAIGPTLMHeadModel", GPT),
    "xglm": tiny("XGLMForCausalLM", COMMON, d_model=96, num_layers=2, attention_heads=8, ffn_dim=160),
    "biogpt": tiny("BioGptForCausalLM", MHA),
}

DECODERS: dict[str, Tiny] = GROUPED | FUSED
