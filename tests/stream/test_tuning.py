"""How far a block's output is from the one wanted: each token on its own scale."""

from __future__ import annotations

import pytest
import torch

from secateur.stream.tuning import apart

TOKENS = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_every_token_counts_as_much_whatever_its_norm() -> None:
    wanted = TOKENS / TOKENS.norm(dim=-1, keepdim=True)
    wanted[:, 0] *= 1e4
    off = torch.zeros_like(wanted)
    off[:, 3] = 0.1 * wanted[:, 3]
    assert float(apart(wanted + off, wanted)) == pytest.approx(0.01 / 6, rel=1e-4)
    off[:, 0] = 0.1 * wanted[:, 0]
    assert float(apart(wanted + off, wanted)) == pytest.approx(0.02 / 6, rel=1e-4)


def test_empty_tokens_do_not_rule() -> None:
    wanted = TOKENS / TOKENS.norm(dim=-1, keepdim=True)
    wanted[:, :2] = 0
    assert float(apart(wanted + 0.01, wanted)) == pytest.approx(8 * 0.01**2, rel=1e-4)


def test_nothing_wanted_gives_a_number() -> None:
    assert float(apart(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))) == pytest.approx(1)


def test_an_image_is_one_example() -> None:
    wanted = torch.stack([torch.ones(2, 3, 3), torch.full((2, 3, 3), 100.0)])
    assert float(apart(wanted * 1.1, wanted)) == pytest.approx(0.01, rel=1e-3)
