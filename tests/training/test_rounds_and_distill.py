"""Rounds of pruning and retraining, and distillation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.errors import ArtifactError, ScheduleError, SecateurError, SelectionError
from secateur.core.topk import count


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def data(step: int, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


def fit(model, optimizer, steps, first=0, distill=None) -> None:
    for step in range(first, first + steps):
        x, y = data(step)
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y)
        (loss if distill is None else distill(loss, output)).backward()
        optimizer.step()


def accuracy(model) -> float:
    assert not model.training
    x, y = data(10**6, 1000)
    return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def dense():
    model = net()
    fit(model, torch.optim.AdamW(model.parameters(), lr=0.01), 400)
    return model.train()


def retrain(model, hold, number) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with hold(optimizer):
        fit(model, optimizer, 60, first=1000 * number)


# ------ rounds


def test_rounds_are_prune_and_hold_by_hand(dense):
    model, twin = copy.deepcopy(dense), copy.deepcopy(dense)
    found = sc.prune_in_rounds_(
        model, sc.Magnitude(), sc.geometric(0.9, 3), retrain, metric=accuracy, allocation=sc.global_
    )
    for number, sparsity in enumerate(sc.geometric(0.9, 3), 1):
        masks = sc.prune_(twin, sc.Magnitude(), sparsity, allocation=sc.global_).masks
        retrain(twin, lambda optimizer, masks=masks: masks.hold(twin, optimizer), number)
        assert found.rounds[number - 1].sparsity == masks.sparsity
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert found.chosen == 3 and found.masks == masks and model.training
    removed = found.masks.entries - found.masks.kept
    assert removed == count(0.9, found.masks.entries)
    assert found.rounds[-1].retrained > found.rounds[-1].pruned and found.rounds[-1].retrained > 0.85
    assert str(found).splitlines()[-1].endswith("*")


def test_rounds_end_at_the_floor_with_the_last_good_weights(dense):
    model, twin = copy.deepcopy(dense), copy.deepcopy(dense)
    steps = (0.5, 0.8, 0.99)
    found = sc.prune_in_rounds_(model, sc.Magnitude(), steps, retrain, metric=accuracy, floor=0.8)
    assert found.chosen == 2 and len(found.rounds) == 3 and found.rounds[2].retrained < 0.8
    sc.prune_in_rounds_(twin, sc.Magnitude(), steps[:2], retrain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    found.masks.check(model)
    # An error, of which lower is better, ends in the same place.
    other = copy.deepcopy(dense)
    again = sc.prune_in_rounds_(
        other,
        sc.Magnitude(),
        steps,
        retrain,
        metric=lambda m: 1 - accuracy(m),
        floor=0.2,
        higher_is_better=False,
    )
    assert again.chosen == 2


def test_the_model_is_as_it_was_when_no_round_is_good_or_one_fails(dense):
    before = copy.deepcopy(dense.state_dict())

    def failing(model, hold, number):
        if number == 2:
            raise RuntimeError("out of data")
        retrain(model, hold, number)

    def forgetful(model, hold, number):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)

    for error, how, floor in (
        (SecateurError, retrain, 1.1),
        (RuntimeError, failing, None),
        (SecateurError, forgetful, None),  # weights that went are no longer zero
    ):
        with pytest.raises(error):
            sc.prune_in_rounds_(dense, sc.Magnitude(), (0.5, 0.9), how, metric=accuracy, floor=floor)
        assert all(
            torch.equal(a, b) for a, b in zip(before.values(), dense.state_dict().values(), strict=True)
        )


def test_finished_rounds_are_not_repeated(dense, tmp_path):
    whole = copy.deepcopy(dense)
    expected = sc.prune_in_rounds_(whole, sc.Magnitude(), (0.5, 0.7, 0.9), retrain, metric=accuracy)
    seen = []

    def stopping(model, hold, number):
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt
        retrain(model, hold, number)

    model = copy.deepcopy(dense)
    given = {"metric": accuracy, "folder": tmp_path / "rounds"}
    with pytest.raises(KeyboardInterrupt):
        sc.prune_in_rounds_(model, sc.Magnitude(), (0.5, 0.7, 0.9), stopping, **given)
    found = sc.prune_in_rounds_(model, sc.Magnitude(), (0.5, 0.7, 0.9), stopping, **given)
    assert seen == [1, 2, 2, 3]
    assert found.rounds == expected.rounds and found.masks == expected.masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_rounds_of_something_else_are_not_taken(dense, tmp_path):
    folder, model = tmp_path / "rounds", copy.deepcopy(dense)

    def again(model, criterion):
        return sc.prune_in_rounds_(model, criterion, (0.5,), lambda *_: None, folder=folder)

    again(model, sc.Magnitude())
    with pytest.raises(ArtifactError, match="other settings"):
        again(copy.deepcopy(dense), sc.Random())
    other = copy.deepcopy(dense)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    left = copy.deepcopy(other)
    with pytest.raises(ArtifactError, match="began with other weights"):
        again(other, sc.Magnitude())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), left.parameters(), strict=True))
    assert again(copy.deepcopy(dense), sc.Magnitude()).sparsity == pytest.approx(0.5, abs=1e-3)
    for name in ("001.safetensors", "001.json", "rounds.json"):
        (folder / name).write_text("{")
        with pytest.raises(ArtifactError, match="is damaged"):
            again(copy.deepcopy(dense), sc.Magnitude())


def test_learning_rates_of_retraining():
    def factor(step):
        return 1.0 if step < 60 else 0.1 if step < 80 else 0.01

    rewound = sc.lr_rewinding(factor, total=100, steps=50)
    assert [rewound(i) for i in (0, 9, 10, 29, 30, 49)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert [sc.fine_tuning(factor, total=100)(i) for i in (0, 49)] == [0.01, 0.01]
    assert sc.geometric(0.488, 3) == pytest.approx((0.2, 0.36, 0.488))
    with pytest.raises(ScheduleError):
        sc.lr_rewinding(factor, total=100, steps=101)
    with pytest.raises(ScheduleError):
        sc.geometric(1.0, 3)
    with pytest.raises(ScheduleError, match="increase"):
        sc.prune_in_rounds_(net(), sc.Magnitude(), (0.5, 0.5), retrain)
    with pytest.raises(SecateurError, match="metric"):
        sc.prune_in_rounds_(net(), sc.Magnitude(), (0.5,), retrain, floor=0.5)


# ------ distillation


def test_the_loss_is_that_of_the_formula(dense):
    student = net(1)
    dense.zero_grad()
    x, y = data(3)
    with sc.Distill(
        student, dense, weight=0.7, temperature=3.0, hidden={"1": "1", "3": "1"}, hidden_weight=0.2
    ) as d:
        output = student(x)
        loss = d(F.cross_entropy(output, y), output)
    with torch.no_grad():
        t, h = dense(x), dense[:2](x)
        p = (t / 3).softmax(1)
        kl = (p * (p.log() - (output / 3).log_softmax(1))).sum(1).mean()
        expected = 0.3 * F.cross_entropy(output, y) + 0.7 * 9 * kl
        expected += 0.2 * sum(((s - h) ** 2).sum() / (h**2).sum() for s in (student[:2](x), student[:4](x)))
    torch.testing.assert_close(loss.detach(), expected)
    # The gradient of T^2 KL does not vanish with the temperature, and none reaches the teacher.
    loss.backward()
    assert all(p.grad is None for p in dense.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert dense.training  # as it was
    assert not student._forward_pre_hooks and not student[1]._forward_hooks


def test_positions_that_do_not_count(dense):
    student = net(1)
    x, y = data(3)
    where = torch.arange(32) < 20
    with sc.Distill(student, dense, weight=1.0) as d:
        output = student(x)
        part = d(F.cross_entropy(output, y), output, where)
    with sc.Distill(student, dense, weight=1.0) as d:
        output = student(x[:20])
        whole = d(F.cross_entropy(output, y[:20]), output)
    torch.testing.assert_close(part, whole)


def test_a_pruned_model_learns_more_from_its_teacher_than_from_a_few_labels(dense):
    """With noisy labels, the dense model's outputs are the better teacher."""
    gains = []
    for seed in range(3):
        ends = []
        for taught in (False, True):
            model = copy.deepcopy(dense)
            masks = sc.prune_(model, sc.Magnitude(), 0.85).masks
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            with masks.hold(model, optimizer), sc.Distill(model, dense, weight=1.0) as distill:
                for step in range(80):
                    x, y = data(10**4 * (seed + 1) + step)
                    noise = torch.rand(32, generator=torch.Generator().manual_seed(step)) < 0.4
                    y = torch.where(noise, (y + 1) % 3, y)
                    optimizer.zero_grad()
                    output = model(x)
                    loss = F.cross_entropy(output, y)
                    (distill(loss, output) if taught else loss).backward()
                    optimizer.step()
            with torch.no_grad():
                ends.append(accuracy(model.eval()))
        gains.append(ends[1] - ends[0])
    assert min(gains) > 0


def test_outputs_of_transformers_and_wrapped_students(dense):
    class Output(dict):
        pass

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x=None):
            return Output(logits=self.inner(x))

    student, x = Wrapped(net(1)), data(3)[0]
    compiled = torch.compile(student, backend="eager")
    with sc.Distill(compiled, Wrapped(dense), hidden={"inner.1": "inner.1"}) as d:
        output = compiled(x=x)
        assert d(torch.zeros(()), output) > 0


def test_what_goes_wrong_with_distillation(dense):
    student, x = net(1), data(3)[0]
    with pytest.raises(SecateurError, match="weight"):
        sc.Distill(student, dense, weight=1.5)
    with pytest.raises(SelectionError, match="teacher has no module '9'"):
        sc.Distill(student, dense, hidden={"1": "9"})
    with sc.Distill(student, dense) as d:
        with pytest.raises(SecateurError, match="there was none"):
            d(torch.zeros(()), x)
        with pytest.raises(SecateurError, match=r"logits.*got list"):
            d(torch.zeros(()), [student(x)])
    with (
        sc.Distill(student, dense, hidden={"1": "4"}) as d,
        pytest.raises(SecateurError, match="The output of 1"),
    ):
        d(torch.zeros(()), student(x))
    with sc.Distill(student, dense[:4]) as d, pytest.raises(SecateurError, match="logits have shape"):
        d(torch.zeros(()), student(x))
