"""A full disk, told by files that cannot grow: one sentence; the same call goes on once there is space."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.core.errors import SecateurError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While this holds, every write behind this size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 97}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    return tmp_path / "dense"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("limit", "match"),
    [(8_000, r"model-.*cannot be copied .*free space"), (60_000, r"states.*cannot be written .*free space")],
    ids=["copying", "states"],
)
def test_a_full_disk_is_one_sentence(limit: int, match: str, dense: Path, tmp_path: Path) -> None:
    before, out = files(dense), tmp_path / "out"
    batches: list[dict[str, Tensor]] = [{"input_ids": torch.arange(4 * 96).view(4, 96) % 97}] * 2
    given: dict[str, Any] = {"batches": batches}
    with pytest.raises(SecateurError, match=match) as caught, largest_file(limit):
        sc.prune_checkpoint(dense, out, sc.SparseGPT(), 0.5, **given)
    assert "\n" not in str(caught.value)
    assert files(dense) == before and not files(out)
    sc.prune_checkpoint(dense, out, sc.SparseGPT(), 0.5, **given)
    sc.prune_checkpoint(dense, tmp_path / "whole", sc.SparseGPT(), 0.5, **given)
    for name, content in files(tmp_path / "whole").items():
        if name.endswith(".safetensors"):
            assert content == files(out)[name]
    assert not (out / ".secateur-run").exists()
