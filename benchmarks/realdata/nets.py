"""The three vision networks and their pretrained weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .root import data_root


class Subsample(nn.Module):
    """Option-A shortcut: every second pixel; new channels are zero, a quarter of the width on each side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.side = width // 4

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; halves the resolution where it doubles the width."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        grows = width != width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=2 if grows else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = Subsample(width) if grows else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


class ResNet20(nn.Module):
    """CIFAR ResNet, three stages of three blocks, 16/32/64 channels: images [B, 3, 32, 32] -> logits [B, 10].

    Initialised by Kaiming's normal rule as in the paper. Source: He et al. 2016, section 4.2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16)
        self.layer2 = _stage(16, 32)
        self.layer3 = _stage(32, 64)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def _stage(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(width_in, width), BasicBlock(width, width), BasicBlock(width, width))


class LeNet300(nn.Module):
    """LeNet-300-100, an MLP: images [B, 1, 28, 28] -> logits [B, 10]. Source: LeCun et al. 1998."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(h)))
        return logits


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's form: images [B, 1, 28, 28] -> logits [B, 10]. Source: LeCun et al. 1998.

    Differs from the paper: Caffe's widths (20/50/500), ReLU, max pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(h.flatten(1))))
        return logits


def resnet20() -> ResNet20:
    """ResNet-20 fine-tuned to JPEG-compressed CIFAR-10 (87.96 % on the test set); channels_last for speed."""
    model = ResNet20()
    _load_(model, data_root() / "resnet_cifar10" / "resnet20_jpeg.safetensors")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def lenet300() -> LeNet300:
    """LeNet-300-100 trained on Fashion-MNIST (89.19 % on the test set)."""
    model = LeNet300()
    _load_(model, data_root() / "fashion_mnist" / "lenet_300_100.safetensors")
    return model


def lenet5() -> LeNet5:
    """LeNet-5 trained on Fashion-MNIST (91.10 % on the test set)."""
    model = LeNet5()
    _load_(model, data_root() / "fashion_mnist" / "lenet5_caffe.safetensors")
    return model


def _load_(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path))
    model.eval()
