"""Sparse layers in real pretrained models: the same text, the same embeddings."""

import pytest
import torch

import secateur as sc
from benchmarks import realdata

pytest.importorskip("transformers")


@pytest.mark.realdata("stories260k")
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("memory", [0.0, 2.0])
def test_a_language_model_writes_the_same(sparsity, memory, compiled):
    model = realdata.stories260k()
    sc.prune_(model, sc.Magnitude(), sparsity)
    fast = sc.runtime.compress(model, measure=False)
    if memory:
        for module in fast.modules():
            if isinstance(module, sc.runtime.SparseLinear) and sc.runtime.native.library() is not None:
                module.set_plan(sc.runtime.Plan.of(module.packed))
    assert len(fast.compress_report.converted) > 20
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    options = {"max_new_tokens": 40, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    long = torch.randint(3, 500, (3, 60), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fast(long).logits, model(long).logits, atol=1e-3)


@pytest.mark.realdata("minilm_l6", "stsb")
def test_sentences_mean_the_same(compiled):
    model = realdata.minilm()
    sc.prune_(model, sc.Magnitude(), 0.5)
    fast = sc.runtime.compress(model, measure=False)
    ids = torch.randint(1000, 20000, (4, 20), generator=torch.Generator().manual_seed(0))
    expected, found = model(ids).last_hidden_state, fast(ids).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)
