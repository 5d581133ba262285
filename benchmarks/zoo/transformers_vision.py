"""Tiny models of transformers for pictures and videos, some of them with text."""

from __future__ import annotations

from benchmarks.zoo.tiny import VOCABULARY, Tiny, image, normal, text, tiny, together

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 160,
    "num_labels": 5,
}
SMALL = image(32)
LARGE = image(64)
PYRAMID = {
    "image_size": 64,
    "num_channels": 3,
    "num_encoder_blocks": 4,
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [16, 32, 48, 64],
    "num_attention_heads": [2, 4, 4, 8],
    "mlp_ratios": [2, 2, 4, 4],
    "num_labels": 5,
    "drop_path_rate": 0.0,
}
SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [4, 8],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "num_labels": 5,
    "drop_path_rate": 0.0,
}
STAGES = {"depths": [1, 2, 2], "hidden_sizes": [16, 32, 48], "num_labels": 5, "drop_path_rate": 0.0}
RESNET = {"embedding_size": 12, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "num_labels": 5}
TEXT_TOWER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "projection_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP = {"text_config": TEXT_TOWER, "vision_config": VIT, "projection_dim": 40}
TOKENS_AND_IMAGE = together(text, SMALL)
DETR = {
    "d_model": 96,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 112,
    "num_queries": 6,
    "num_labels": 5,
    "use_pretrained_backbone": False,
    "use_timm_backbone": False,
}
BACKBONE = {"model_type": "resnet", **RESNET, "out_features": ["stage4"]}

VISION: dict[str, Tiny] = {
    "vit": tiny("ViTForImageClassification", VIT, inputs=SMALL),
    "deit": tiny("DeiTForImageClassification", VIT, inputs=SMALL),
    "dinov2": tiny("Dinov2ForImageClassification", VIT, mlp_ratio=2, inputs=SMALL),
    "dinov2_swiglu": tiny(
        "Dinov2ForImageClassification", VIT, mlp_ratio=2, use_swiglu_ffn=True, inputs=SMALL
    ),
    "dinov2_with_registers": tiny(
        "Dinov2WithRegistersForImageClassification", VIT, mlp_ratio=2, num_register_tokens=4, inputs=SMALL
    ),
    "dinov3_vit": tiny("DINOv3ViTModel", VIT, num_register_tokens=4, use_gated_mlp=True, inputs=SMALL),
    "beit": tiny(
        "BeitForImageClassification",
        VIT,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        inputs=SMALL,
    ),
    "data2vec_vision": tiny(
        "Data2VecVisionForImageClassification",
        VIT,
        use_shared_relative_position_bias=True,
        drop_path_rate=0.0,
        inputs=SMALL,
    ),
    "ijepa": tiny("IJepaForImageClassification", VIT, inputs=SMALL),
    "vit_mae": tiny(
        "ViTMAEForPreTraining",
        VIT,
        decoder_hidden_size=64,
        decoder_intermediate_size=112,
        decoder_num_attention_heads=4,
        decoder_num_hidden_layers=1,
        # The order in which patches are hidden is drawn in the forward unless it is given.
        inputs=together(SMALL, normal("noise", 16)),
    ),
    "vit_msn": tiny("ViTMSNForImageClassification", VIT, inputs=SMALL),
    "yolos": tiny("YolosForObjectDetection", VIT, image_size=[32, 32], num_detection_tokens=6, inputs=SMALL),
    "swin": tiny("SwinForImageClassification", SWIN, inputs=LARGE),
    "swinv2": tiny("Swinv2ForImageClassification", SWIN, pretrained_window_sizes=[0, 0], inputs=LARGE),
    "convnext": tiny(
        "ConvNextForImageClassification",
        STAGES | {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]},
        num_stages=4,
        inputs=LARGE,
    ),
    "convnextv2": tiny(
        "ConvNextV2ForImageClassification",
        STAGES | {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1]},
        num_stages=4,
        inputs=LARGE,
    ),
    "resnet": tiny("ResNetForImageClassification", RESNET, inputs=LARGE),
    "resnet_basic": tiny("ResNetForImageClassification", RESNET, layer_type="basic", inputs=LARGE),
    "regnet": tiny("RegNetForImageClassification", RESNET, groups_width=8, inputs=LARGE),
    "bit": tiny("BitForImageClassification", RESNET, num_groups=4, inputs=LARGE),
    "segformer": tiny("SegformerForSemanticSegmentation", PYRAMID, decoder_hidden_size=40, inputs=LARGE),
    "glpn": tiny("GLPNForDepthEstimation", PYRAMID, decoder_hidden_size=40, inputs=LARGE),
    "pvt": tiny("PvtForImageClassification", PYRAMID, inputs=LARGE),
    "pvt_v2": tiny("PvtV2ForImageClassification", PYRAMID, inputs=LARGE),
    "pvt_v2_linear": tiny("PvtV2ForImageClassification", PYRAMID, linear_attention=True, inputs=LARGE),
    "poolformer": tiny("PoolFormerForImageClassification", PYRAMID, mlp_ratio=2.0, inputs=LARGE),
    "mobilevit": tiny(
        "MobileViTForImageClassification",
        image_size=64,
        hidden_sizes=[48, 64, 80],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        num_attention_heads=4,
        num_labels=5,
        inputs=LARGE,
    ),
    "mobilevitv2": tiny(
        "MobileViTV2ForImageClassification",
        image_size=64,
        n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[32, 48, 64],
        width_multiplier=0.25,
        num_labels=5,
        inputs=LARGE,
    ),
    "mobilenet_v1": tiny(
        "MobileNetV1ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5, inputs=LARGE
    ),
    "mobilenet_v2": tiny(
        "MobileNetV2ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5, inputs=LARGE
    ),
    "efficientnet": tiny(
        "EfficientNetForImageClassification",
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        num_labels=5,
        inputs=LARGE,
    ),
    "levit": tiny(
        "LevitForImageClassification",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[4, 6, 8],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        num_labels=5,
        inputs=LARGE,
    ),
    "cvt": tiny(
        "CvtForImageClassification",
        embed_dim=[16, 32, 48],
        num_heads=[2, 4, 6],
        depth=[1, 2, 3],  # a stage looks up its drop path by its own index, so it needs that many layers
        mlp_ratio=[2.0, 2.0, 4.0],
        drop_path_rate=[0.0, 0.0, 0.0],
        num_labels=5,
        inputs=LARGE,
    ),
    "focalnet": tiny(
        "FocalNetForImageClassification",
        image_size=64,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        mlp_ratio=2.0,
        use_layerscale=True,
        num_labels=5,
        inputs=LARGE,
    ),
    "hiera": tiny(
        "HieraForImageClassification",
        embed_dim=16,
        image_size=[64, 64],
        depths=[1, 1, 1],
        num_heads=[2, 4, 8],
        num_query_pool=2,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False],
        mlp_ratio=2.0,
        num_labels=5,
        inputs=LARGE,
    ),
    "swiftformer": tiny(
        "SwiftFormerForImageClassification",
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dims=[16, 32, 48, 64],
        mlp_ratio=2,
        num_labels=5,
        inputs=LARGE,
    ),
    "textnet": tiny(
        "TextNetForImageClassification",
        image_size=64,
        stem_out_channels=12,
        hidden_sizes=[12, 32, 48, 64, 80],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
        conv_layer_strides=[[2], [2, 1], [2, 1], [2]],
        num_labels=5,
        inputs=LARGE,
    ),
    "hgnet_v2": tiny(
        "HGNetV2ForImageClassification",
        embedding_size=16,
        depths=[1, 1, 1, 1],
        hidden_sizes=[32, 48, 64, 80],
        stem_channels=[3, 12, 16],
        stage_in_channels=[16, 32, 48, 64],
        stage_mid_channels=[12, 16, 20, 24],
        stage_out_channels=[32, 48, 64, 80],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        use_learnable_affine_block=True,
        num_labels=5,
        inputs=LARGE,
    ),
    "dpt": tiny(
        "DPTForDepthEstimation",
        VIT,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 24, 32, 48],
        fusion_hidden_size=40,
        neck_ignore_stages=[],
        inputs=SMALL,
    ),
    "detr": tiny("DetrForObjectDetection", DETR, backbone_config=BACKBONE, inputs=LARGE),
    "conditional_detr": tiny(
        "ConditionalDetrForObjectDetection",
        DETR,
        decoder_attention_heads=8,
        backbone_config=BACKBONE,
        inputs=LARGE,
    ),
    "clip": tiny("CLIPModel", CLIP, inputs=TOKENS_AND_IMAGE),
    "siglip": tiny(
        "SiglipModel",
        CLIP,
        text_config=TEXT_TOWER | {"max_position_embeddings": 11, "projection_size": 96},
        inputs=TOKENS_AND_IMAGE,
    ),
    "blip": tiny(
        "BlipForImageTextRetrieval",
        CLIP,
        text_config=TEXT_TOWER | {"encoder_hidden_size": 96},
        image_text_hidden_size=40,
        inputs=TOKENS_AND_IMAGE,
    ),
    "owlvit": tiny("OwlViTModel", CLIP, inputs=TOKENS_AND_IMAGE),
    "imagegpt": tiny(
        "ImageGPTForImageClassification",
        vocab_size=VOCABULARY,
        n_embd=96,
        n_layer=2,
        n_head=8,
        n_inner=160,
        n_positions=64,
        num_labels=5,
        use_cache=False,
    ),
    "timesformer": tiny(
        "TimesformerForVideoClassification", VIT, num_frames=2, inputs=normal("pixel_values", 2, 3, 32, 32)
    ),
    "videomae": tiny(
        "VideoMAEForVideoClassification", VIT, num_frames=4, inputs=normal("pixel_values", 4, 3, 32, 32)
    ),
    "vivit": tiny(
        "VivitForVideoClassification",
        VIT,
        num_frames=4,
        tubelet_size=[2, 8, 8],
        inputs=normal("pixel_values", 4, 3, 32, 32),
    ),
}
