"""Models of timm: one for each family, that is for each module of `timm.models`.

Chosen once, as the smallest registered model of a family that is not a toy, of full size: channel counts and
layouts are those that people prune. Where even the smallest is large, its depth is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.operators import prepare

_FAMILIES = (
    "bat_resnext26ts beit_base_patch16_224 cait_xxs24_224 coat_lite_mini coatnet_nano_cc_224",
    "convit_tiny convmixer_768_32 convnext_atto cpubone_b0_bfrobust crossvit_9_240 cs3darknet_focus_m",
    "csatv2 cspnext_s davit_tiny deepseek_vit_412m deit3_small_patch16_224 densenet121 dla46_c dpn48b",
    "eca_botnext26ts_256 edgenext_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0",
    "efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224",
    "fasternet_t0 fastvit_mci0 fbnetv3_b focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050",
    "gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_m",
    "inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_base legacy_seresnet18",
    "legacy_xception levit_128 lowformer_b0 mambaout_femto mobilenetv5_base mobilevit_s mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_ecaresnet26 pit_ti_224",
    "pnasnet5large poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050",
    "repvit_m0_9 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny",
    "samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_s",
    "swin_tiny_patch4_window7_224 swinv2_cr_small_224 swinv2_tiny_window8_256 test_vit_relpos",
    "tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny",
    "vit_small_r26_s32_224 vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 xception41p",
    "xcit_nano_12_p8_224",
)
NAMES = tuple(" ".join(_FAMILIES).split())

SETTINGS: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 4}, "gemma4_vit_167m": {"depth": 4}}
"""Arguments of the constructor."""

PIXELS = {"bat_resnext26ts": 256, "deepseek_vit_412m": 224}
"""Where the usual size is fixed in fact, or no multiple of the patch's."""


def create(name: str, generator: torch.Generator) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model in evaluation mode, and its input [1, 3, height, width], small where possible."""
    prepare()
    import timm

    usual = timm.get_pretrained_cfg(name)
    settings = SETTINGS.get(name, {})
    if usual.num_classes == 0:
        settings = settings | {"num_classes": 10}  # without a head, the output would be the width itself
    model = timm.create_model(name, pretrained=False, **settings).eval()
    size = PIXELS.get(name, usual.input_size[-1] if usual.fixed_input_size else 128)
    return model, (torch.randn(1, 3, size, size, generator=generator),), {}
