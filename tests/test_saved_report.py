"""Reports read again: the page and the table are those of the report that was saved."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import ArtifactError
from secateur.core.plain import value_of
from secateur.pages import prune_page
from secateur.shrink_page import drop_page, page_of, shrink_page


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(4)]


def zeros(tmp_path):
    model = net()
    return sc.prune_(model, sc.Magnitude(), 0.5), model, prune_page


def solved(tmp_path):
    model = net()
    return sc.prune_(model, sc.SparseGPT(), 0.5, batches=batches()), model, prune_page


def trained(tmp_path):
    model = net()
    method = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.7, begin=0, end=6), when=sc.every(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with method.attach(optimizer):
        for x, y in batches() * 2:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return method.report(), model, prune_page


def shrunk(tmp_path):
    model = net()
    budget, example = sc.Budget.params(0.6), batches()[0][0]
    return sc.shrink_(model, example, budget, batches=batches(), loss=F.cross_entropy), model, shrink_page


def dropped(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    x = torch.randn(2, 5, 8)
    return sc.drop_least_(model, 1, x, [x]), model, drop_page


@pytest.mark.parametrize("make", [zeros, solved, trained, shrunk, dropped])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_report_says_the_same_after_it_was_saved(make, tmp_path):
    report, model, page = make(tmp_path)
    sc.save(model, tmp_path / "out", report=report)
    again = sc.load_report(tmp_path / "out")
    assert type(again) is type(report)
    assert page_of(again) == page(report) == page_of(report)
    assert str(again) == str(report)
    assert sc.load_report(tmp_path / "out" / "report.json").to_dict() == again.to_dict()
    left_out = ("surgery", "record", "cuts")
    old, new = (json.loads(json.dumps(x.to_dict())) for x in (report, again))
    assert {k: v for k, v in new.items() if k not in left_out} == {
        k: v for k, v in old.items() if k not in left_out
    }
    if make is shrunk:
        with pytest.raises(ArtifactError, match="no model to give its tensors back to"):
            again.undo()
    if make is dropped:
        with pytest.raises(ArtifactError, match="no model to put its blocks back into"):
            again.record.undo()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("before"), "before is missing"),
        (lambda d: d["before"].update(parameters="many"), r"before\.parameters is 'many', which is no int"),
        (lambda d: d["layers"].append(3), r"layers\[2\] is not a mapping"),
        (lambda d: d["layers"][0].update(shape=["a"]), r"layers\[0\]\.shape\[0\] is 'a'"),
        (lambda d: d.update(skipped=[5]), "no report of pruning, or damaged"),
        (lambda d: d.update(settings=[]), "settings is"),
        (lambda d: d.pop("layers"), "is no report of pruning"),
    ],
)
def test_damaged_reports_are_refused(change, message, tmp_path):
    report, *_ = zeros(tmp_path)
    data = report.to_dict()
    data["layers"] = [dict(layer) for layer in data["layers"]]
    change(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        sc.load_report(tmp_path)


def test_what_is_no_report(tmp_path):
    with pytest.raises(ArtifactError, match="save\\(model, folder, report=report\\) writes one"):
        sc.load_report(tmp_path)
    for text in ("{", "[]", '{"settings": {}}', '"layers"'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ArtifactError):
            sc.load_report(tmp_path)


def test_values_have_the_types_of_their_hints():
    assert value_of(float, 3) == 3.0 and type(value_of(float, 3)) is float
    assert value_of(int | None, None) is None and value_of(tuple[int, str], [1, "a"]) == (1, "a")
    for hint, data in ((int, True), (float, "1"), (tuple[int, str], [1]), (str, None), (int, 1.0)):
        with pytest.raises(ArtifactError):
            value_of(hint, data, "x")
