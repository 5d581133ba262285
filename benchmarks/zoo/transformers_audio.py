"""Tiny models of transformers for sound."""

from __future__ import annotations

from benchmarks.zoo.tiny import Tiny, normal, tiny
from benchmarks.zoo.transformers_vision import VIT

WAV2VEC = {
    "vocab_size": 32,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 160,
    "conv_dim": [16, 24, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 4, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "classifier_proj_size": 40,
    "num_labels": 5,
    "pad_token_id": 0,
}
WAVE = normal("input_values", 2000)

AUDIO: dict[str, Tiny] = {
    "wav2vec2": tiny("Wav2Vec2ForCTC", WAV2VEC, inputs=WAVE),
    "wav2vec2_layer_norm": tiny(
        "Wav2Vec2ForCTC",
        WAV2VEC,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        inputs=WAVE,
    ),
    "wav2vec2_conformer": tiny("Wav2Vec2ConformerForCTC", WAV2VEC, conv_depthwise_kernel_size=5, inputs=WAVE),
    "wav2vec2_bert": tiny(
        "Wav2Vec2BertForSequenceClassification",
        WAV2VEC,
        feature_projection_input_dim=20,
        conv_depthwise_kernel_size=5,
        inputs=normal("input_features", 24, 20),
    ),
    "hubert": tiny("HubertForSequenceClassification", WAV2VEC, inputs=WAVE),
    "wavlm": tiny(
        "WavLMForSequenceClassification", WAV2VEC, num_buckets=16, max_bucket_distance=32, inputs=WAVE
    ),
    "unispeech": tiny("UniSpeechForSequenceClassification", WAV2VEC, inputs=WAVE),
    "unispeech_sat": tiny("UniSpeechSatForSequenceClassification", WAV2VEC, inputs=WAVE),
    "sew": tiny("SEWForSequenceClassification", WAV2VEC, squeeze_factor=2, inputs=WAVE),
    "sew_d": tiny(
        "SEWDForSequenceClassification",
        WAV2VEC,
        squeeze_factor=2,
        position_buckets=8,
        max_position_embeddings=32,
        inputs=WAVE,
    ),
    "data2vec_audio": tiny("Data2VecAudioForSequenceClassification", WAV2VEC, inputs=WAVE),
    "audio_spectrogram_transformer": tiny(
        "ASTForAudioClassification",
        VIT,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
        inputs=normal("input_values", 32, 16),
    ),
}
