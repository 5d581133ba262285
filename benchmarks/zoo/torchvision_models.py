"""Models of torchvision: classification, segmentation and video, with the weights of no checkpoint.

Left out are quantized models, detection and optical flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.operators import prepare

CLASSIFICATION = (
    "alexnet",
    "convnext_tiny convnext_small convnext_base convnext_large",
    "densenet121 densenet161 densenet169 densenet201",
    "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5",
    "efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l",
    "googlenet inception_v3",
    "maxvit_t",
    "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    "mobilenet_v2 mobilenet_v3_large mobilenet_v3_small",
    "regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf",
    "regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf",
    "regnet_y_128gf",
    "resnet18 resnet34 resnet50 resnet101 resnet152",
    "resnext50_32x4d resnext101_32x8d resnext101_64x4d",
    "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    "squeezenet1_0 squeezenet1_1",
    "swin_t swin_s swin_b swin_v2_t swin_v2_s swin_v2_b",
    "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    "vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14",
    "wide_resnet50_2 wide_resnet101_2",
)
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101",
    "fcn_resnet50 fcn_resnet101 lraspp_mobilenet_v3_large",
)
VIDEO = ("mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_t swin3d_s swin3d_b",)
NAMES = tuple(" ".join(CLASSIFICATION + SEGMENTATION + VIDEO).split())

_VIDEO = frozenset(" ".join(VIDEO).split())
_SEGMENTATION = frozenset(" ".join(SEGMENTATION).split())


def shape(name: str) -> tuple[int, ...]:
    """Of the input, [1, 3, height, width] or [1, 3, frames, height, width]: small where the model allows."""
    if name in _VIDEO:
        return (1, 3, 16, 224, 224) if name.startswith(("s3d", "mvit")) else (1, 3, 8, 112, 112)
    if name == "inception_v3":
        return (1, 3, 299, 299)
    size = 224 if name.startswith(("vit", "swin", "maxvit", "vgg", "alexnet")) else 128
    return (1, 3, size, size)


def settings(name: str) -> dict[str, Any]:
    """Arguments of the constructor."""
    if name in ("googlenet", "inception_v3"):
        # An auxiliary classifier runs in training only; their initialisation takes half a minute.
        return {"aux_logits": False, "init_weights": False}
    return {"weights_backbone": None} if name in _SEGMENTATION else {}


def create(name: str, generator: torch.Generator) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model in evaluation mode, and its input."""
    prepare()
    from torchvision.models import get_model

    model = get_model(name, weights=None, **settings(name)).eval()
    return model, (torch.randn(shape(name), generator=generator),), {}
