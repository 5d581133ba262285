"""CIFAR-10 (JPEG-compressed) and Fashion-MNIST as normalised tensors."""

import gzip
import io
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .root import count, data_root

Split = Literal["train", "test"]
CHUNK = 1000  # CIFAR-10 images decoded and cached together
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)


def cifar10(split: Split, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The first n examples of CIFAR-10, every image decoded at most once per process.

    Images are interleaved by class: every n that is a multiple of 10 gives a class-balanced subset. They
    were JPEG-compressed: compare accuracies only with that of the dense `resnet20`, not with published ones.

    Returns:
        Normalised images [n, 3, 32, 32], float32, channels_last, and labels [n], int64.

    Raises:
        ValueError: unknown split, or n larger than the split.
    """
    _check_split(split)
    labels = _cifar_files(split)["labels"]
    n = count(n, len(labels), f"CIFAR-10 {split}")
    chunks = [_cifar_chunk(split, start) for start in range(0, n, CHUNK)]
    images = torch.cat(chunks)[:n].permute(0, 3, 1, 2)
    return _normalise(images, CIFAR_MEAN, CIFAR_STD), torch.from_numpy(labels[:n].astype(np.int64))


def fashion_mnist(split: Split, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The first n examples of Fashion-MNIST in the order of the original files.

    Returns:
        Normalised images [n, 1, 28, 28], float32, and labels [n], int64.

    Raises:
        ValueError: unknown split, or n larger than the split.
    """
    _check_split(split)
    stem = {"train": "train", "test": "t10k"}[split]
    labels = _idx(f"{stem}-labels-idx1-ubyte.gz", header=8)
    n = count(n, len(labels), f"Fashion-MNIST {split}")
    images = _idx(f"{stem}-images-idx3-ubyte.gz", header=16).view(-1, 1, 28, 28)
    return _normalise(images[:n], FASHION_MEAN, FASHION_STD), labels[:n].long()


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"The split must be 'train' or 'test', but it is {split!r}.")


@cache
def _cifar_files(split: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(data_root() / "cifar10_jpeg" / f"{split}.npz") as archive:
        return {name: archive[name] for name in ("data", "offsets", "labels")}


@cache
def _cifar_chunk(split: str, start: int) -> Tensor:
    """Images start..start+CHUNK-1 as uint8 [CHUNK, 32, 32, 3]."""
    files = _cifar_files(split)
    data, offsets = files["data"], files["offsets"][start : start + CHUNK + 1]
    jpegs = (io.BytesIO(data[i:j].tobytes()) for i, j in pairwise(offsets))
    return torch.from_numpy(np.stack([np.asarray(Image.open(jpeg).convert("RGB")) for jpeg in jpegs]))


@cache
def _idx(name: str, header: int) -> Tensor:
    """The bytes of an idx file after its header, as a flat uint8 tensor."""
    raw = gzip.decompress((data_root() / "fashion_mnist" / name).read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header)


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images / 255 - mean) / std per channel, as a new float32 tensor of the same memory format."""
    x = images.float().div_(255)
    return x.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
