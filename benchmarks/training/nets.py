"""Networks, data and learning rates of the comparison; dense weights to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import realdata
from secateur.core.files import replacing

CACHE = Path(__file__).resolve().parents[1] / "cache"
Data = tuple[Tensor, Tensor]

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)


class VGG16(nn.Module):
    """VGG-16 with batch normalisation for images of 32 x 32, all widths divided by four (0.93 M weights).

    Source: Simonyan & Zisserman 2015, configuration D, with one linear layer as is usual for CIFAR-10.
    """

    def __init__(self, divisor: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for wide in _VGG16:
            if wide == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(width, wide // divisor, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.BatchNorm2d(wide // divisor), nn.ReLU()]
            width = wide // divisor
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits


@dataclass(frozen=True)
class Net:
    """One network with its data and how it is trained: SGD with momentum and a cosine to zero.

    `dense` gives the weights that all methods start from.
    """

    dense: Callable[[], nn.Module]
    data: Callable[..., Data]
    epochs: int
    rate: float
    decay: float
    augmented: bool
    batch: int = 128


def vgg16() -> nn.Module:
    """Trained here for 20 epochs from a random initialisation with seed 0, and kept in `benchmarks/cache`."""
    torch.manual_seed(0)
    model = VGG16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = CACHE / "vgg16.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    from benchmarks.training.loop import Fit

    net = Net(lambda: model, realdata.cifar10, 20, 0.1, 5e-4, True)
    Fit(net, 0).train(model)
    CACHE.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    return model.eval()


NETS: dict[str, Net] = {
    "LeNet-5": Net(realdata.lenet5, realdata.fashion_mnist, 2, 0.02, 1e-4, False),
    "ResNet-20": Net(realdata.resnet20, realdata.cifar10, 1, 0.03, 1e-4, True, 64),
    "VGG-16/4": Net(vgg16, realdata.cifar10, 2, 0.02, 5e-4, True, 64),
}
