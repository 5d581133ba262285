"""The pretrained models measure on the real data what their README promises."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks import realdata
from benchmarks.realdata.language import wikitext2_windows


def share_of_padding(batches: list[tuple[Tensor, Tensor]]) -> float:
    real = sum(int((ids != 0).sum()) for ids, _ in batches)
    return 1 - real / sum(ids.numel() for ids, _ in batches)


def test_data_root_names_the_variable_and_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert realdata.data_root() == tmp_path
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "absent"))
    with pytest.raises(
        FileNotFoundError, match=r"SECATEUR_DATA is set to .*absent.* default is .*shared.data"
    ):
        realdata.data_root()


def test_accuracy_counts_and_leaves_every_mode_alone() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    model.train()
    model[0].eval()
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert realdata.accuracy(model, logits, labels, batch=3) == 0.75
    assert [module.training for module in model.modules()] == [True, False, True]
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        realdata.accuracy(model, logits, labels[:3])


@pytest.mark.realdata("cifar10_jpeg")
def test_cifar10_prefixes_are_balanced_and_consistent() -> None:
    images, labels = realdata.cifar10("test", 1500)
    assert images.shape == (1500, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.bincount().tolist() == [150] * 10
    head, head_labels = realdata.cifar10("test", 20)
    assert torch.equal(head, images[:20]) and torch.equal(head_labels, labels[:20])
    head.zero_()
    assert torch.equal(realdata.cifar10("test", 1500)[0], images), "a caller changed the cache"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.permute(0, 2, 3, 1) * std + mean) * 255
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="CIFAR-10 test has 10000 examples"):
        realdata.cifar10("test", 10_001)
    with pytest.raises(ValueError, match="'train' or 'test', but it is 'dev'"):
        realdata.cifar10("dev")  # type: ignore[arg-type]


@pytest.mark.realdata("cifar10_jpeg", "resnet_cifar10")
def test_resnet20_accuracy() -> None:
    assert realdata.accuracy(realdata.resnet20(), *realdata.cifar10("test", 2000)) == 0.8820


@pytest.mark.realdata("fashion_mnist")
def test_lenet_accuracies() -> None:
    images, labels = realdata.fashion_mnist("test")
    assert labels.bincount().tolist() == [1000] * 10
    assert realdata.accuracy(realdata.lenet300(), images, labels) == pytest.approx(0.8919, abs=1e-4)
    assert realdata.accuracy(realdata.lenet5(), images, labels) == pytest.approx(0.9110, abs=1e-4)


@pytest.mark.realdata("minilm_l6", "stsb")
def test_minilm_spearman() -> None:
    assert realdata.sts_spearman(realdata.minilm(), "test") == pytest.approx(0.8099, abs=5e-4)


@pytest.mark.realdata("minilm_l6", "stsb")
def test_sts_wrapper_and_encoder_measure_the_same() -> None:
    """Spearman is Pearson's correlation of ranks, so the wrapper's cosines give it without `sts_spearman`."""
    encoder = realdata.minilm()
    model = realdata.StsModel(encoder)
    pairs, scores = realdata.stsb("dev", 60)
    with torch.no_grad():
        cosine = torch.cat([model(realdata.sts_inputs([pair])) for pair in pairs])
    ranks = torch.stack([torch.from_numpy(rankdata(values)) for values in (cosine, scores)])
    expected = pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    assert realdata.sts_spearman(encoder, "dev", 60) == expected
    assert realdata.sts_spearman(model, "dev", 60) == expected
    assert {id(p) for p in model.parameters()} == {id(p) for p in encoder.parameters()}
    with pytest.raises(ValueError, match=r"all 1 similarities are equal"):
        realdata.sts_spearman(encoder, "dev", 1)


@pytest.mark.realdata("minilm_l6", "stsb")
def test_sts_examples_are_independent_and_reach_every_parameter() -> None:
    """The gradient of a batch is the mean of its examples' own, padding or not."""
    model = realdata.StsModel(realdata.minilm())
    ids, scores = realdata.calibration("stsb", 4, 4)[0]
    assert ids.shape[:2] == (4, 2) and (ids == 0).any()
    parameters = list(model.parameters())
    whole = torch.autograd.grad(realdata.sts_loss(model(ids), scores), parameters)
    examples = itertools.starmap(
        lambda x, y: torch.autograd.grad(realdata.sts_loss(model(x), y), parameters),
        zip(ids.split(1), scores.split(1), strict=True),
    )
    for batched, *alone in zip(whole, *examples, strict=True):
        assert batched.any()
        torch.testing.assert_close(torch.stack(alone).mean(0), batched, atol=1e-6, rtol=1e-4)


@pytest.mark.realdata("minilm_l6", "banking77")
def test_banking77_accuracy() -> None:
    """355 of the 385 questions that are the first five of each intent; 91.88 % of all 3,080."""
    _, labels = realdata.banking77("test", 385)
    assert labels.bincount().tolist() == [5] * 77
    assert realdata.banking77_accuracy(realdata.minilm(), 385) == pytest.approx(355 / 385, abs=1e-6)


@pytest.mark.realdata("stories260k", "tinystories")
def test_stories260k_nll() -> None:
    assert realdata.stories_nll(realdata.stories260k()) == pytest.approx(1.451, abs=1e-3)


@pytest.mark.realdata("stories260k", "tinystories")
def test_next_token_loss_is_that_of_transformers_and_skips_padding() -> None:
    model = realdata.stories260k()
    ids = realdata.calibration("stories", 1, 1)[0][0][:, :40]
    with torch.no_grad():
        output = model(ids, labels=ids)
        padded = model(F.pad(ids, (0, 7)))
    torch.testing.assert_close(realdata.next_token_loss(output, ids), output.loss)
    torch.testing.assert_close(realdata.next_token_loss(padded, F.pad(ids, (0, 7), value=-100)), output.loss)


@pytest.mark.realdata("smollm2_135m", "wikitext2")
def test_wikitext2_windows_follow_the_protocol() -> None:
    assert wikitext2_windows("test").shape == (312_144 // 1024, 1024)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "stsb", "stories", "wikitext2"])
def test_calibration_has_n_examples_in_batches(name: str) -> None:
    batches = realdata.calibration(name, 10, 4)  # type: ignore[arg-type]
    assert [len(inputs) for inputs, _ in batches] == [len(target) for _, target in batches] == [4, 4, 2]


@pytest.mark.realdata
def test_calibration_is_training_data() -> None:
    images, labels = realdata.calibration("cifar10", 20, 20)[0]
    train, train_labels = realdata.cifar10("train", 20)
    assert torch.equal(images, train) and torch.equal(labels, train_labels)
    assert not torch.equal(images, realdata.cifar10("test", 20)[0])
    with pytest.raises(ValueError, match="No calibration data named 'mnist'"):
        realdata.calibration("mnist", 1, 1)  # type: ignore[arg-type]


@pytest.mark.realdata("minilm_l6", "stsb")
def test_sts_calibration_keeps_pairs_with_scores_and_pads_little() -> None:
    batches = realdata.calibration("stsb", 256, 32)
    assert share_of_padding(batches) < 0.2
    pairs, scores = realdata.stsb("train", 256)
    by_ids = {
        tuple(realdata.sts_inputs([pair]).flatten().tolist()): float(s)
        for pair, s in zip(pairs, scores, strict=True)
    }
    for ids, score in ((ids, s) for batch in batches for ids, s in zip(*batch, strict=True)):
        length = int((ids != 0).sum(-1).max())
        assert by_ids[tuple(ids[:, :length].flatten().tolist())] == float(score)
