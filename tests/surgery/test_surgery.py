"""Planned, applied, undone, saved, replayed; and taken back whatever fails."""

import copy
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import ArtifactError, SurgeryError
from secateur.graph import Graph
from secateur.surgery import Surgery, replay_
from secateur.surgery.apply import carry_out
from secateur.surgery.cuts import Cuts
from tests.graph.prove import assert_same_state, redrawn, state_of

SOURCE = Path(secateur.__file__).parent
WATCHED = tuple(str(SOURCE / part) for part in ("surgery", "graph/swapping.py", "swaps"))


class Config:
    def __init__(self):
        self.heads, self.inner, self.name = 4, 12, "small"


class Model(nn.Module):
    """Numbers in attributes and in a configuration, ties, a norm, and torch's attention."""

    def __init__(self, width=8):
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(11, width)
        self.heads = self.config.heads
        self.qkv, self.out = nn.Linear(width, 3 * 4 * 3), nn.Linear(4 * 3, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.up, self.down = nn.Linear(width, self.config.inner), nn.Linear(self.config.inner, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(((q @ k.mT) * 0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, -1))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        hidden = self.up(self.norm(x)).relu().view(b, t, self.config.inner)
        return self.head(x + self.down(hidden))


IDS = torch.arange(10).view(2, 5)


def model_and_surgery(seed=0):
    model = redrawn(Model().double().eval(), seed)
    graph = Graph.trace(model, IDS)
    kept = {g: list(range(1, g.size, 2)) for g in graph.groups() if g.size % 2 == 0}
    return model, graph, Surgery(kept)


def test_everything_follows():
    model, graph, surgery = model_and_surgery()
    assert {g.kind for g in surgery} >= {"heads", "neurons", "width"}, str(graph)
    plan = surgery.plan()
    assert "heads" in str(plan) and plan.after.params < plan.before.params
    before = state_of(model)
    kept = {(n, d): plan.keep(n, d) for n, p in model.named_parameters() for d in range(p.dim())}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    applied = surgery.apply_(model)
    assert sum(p.numel() for p in model.parameters()) == plan.after.params
    assert model.head.weight is model.embed.weight  # the tie is kept
    assert model.heads == 2 and model.config.inner == 6 and model.config.name == "small"
    assert (model.up.in_features, model.up.out_features, model.embed.embedding_dim) == (4, 6, 4)
    scaled = plan.cuts.scales
    for name, p in model.named_parameters():
        for d in range(p.dim()):
            assert p.shape[d] == int(kept[name, d].sum())
        if name not in scaled:
            for d in range(p.dim()):
                old[name] = old[name].index_select(d, kept[name, d].nonzero().flatten())
            assert torch.equal(p, old[name])
    model(IDS).sum().backward()
    again = Graph.trace(model, IDS)  # a cut model is a model
    assert {g.kind for g in again.groups()} == {g.kind for g in graph.groups()}
    applied.undo()
    model.zero_grad()
    assert_same_state(before, state_of(model))


def test_json_round_trip_and_replay(tmp_path):
    model, _, surgery = model_and_surgery()
    plan = surgery.plan()
    cuts = Cuts.from_dict(json.loads(json.dumps(plan.cuts.to_dict())))
    assert cuts == plan.cuts
    plan.save(tmp_path / "cuts.json")
    fresh = redrawn(Model().double().eval())
    applied = replay_(fresh, tmp_path / "cuts.json")
    surgery.apply_(model)
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(SurgeryError, match="shape"):
        replay_(fresh, tmp_path / "cuts.json")
    applied.undo()
    assert fresh.qkv.weight.shape == (36, 8)


def test_replay_on_the_meta_device():
    _, _, surgery = model_and_surgery()
    with torch.device("meta"):
        fresh = Model().double().eval()
    fresh.head.weight = fresh.embed.weight
    replay_(fresh, {"format": 1, "cuts": [surgery.plan().cuts.to_dict()]})
    assert fresh.up.weight.is_meta and fresh.up.weight.shape == (6, 4)


def mutations():
    """Ways to damage a surgery, each as a function of its data."""
    yield "no axes", lambda d: d.pop("axes")
    yield "kept beyond the end", lambda d: next(iter(d["axes"].values())).update(kept=[[0, 999]])
    yield "kept far beyond the end", lambda d: next(iter(d["axes"].values())).update(kept=[[0, 2**39]])
    yield "kept twice", lambda d: next(iter(d["axes"].values())).update(kept=[[0, 2], [1, 3]])
    yield "nothing kept", lambda d: next(iter(d["axes"].values())).update(kept=[])
    yield "negative", lambda d: next(iter(d["axes"].values())).update(kept=[[-1, 2]])
    yield "size as text", lambda d: next(iter(d["axes"].values())).update(size="8")
    yield "unknown axis", lambda d: next(iter(d["tensors"].values()))["dims"].__setitem__(0, "zz")
    yield "unknown node", lambda d: next(iter(d["tensors"].values()))["dims"].__setitem__(0, ["-", 2, 3])
    yield "float size", lambda d: next(iter(d["tensors"].values()))["dims"].__setitem__(0, 2.5)
    yield "tensors as a list", lambda d: d.update(tensors=[1])
    yield "private attribute", lambda d: d["attributes"][0].update(name="__class__")
    yield "attribute of text", lambda d: d["attributes"][0].update(new="evil")
    yield "step into a private attribute", lambda d: d["attributes"][0].update(steps=["__dict__"])
    yield "scales of text", lambda d: d.update(scales={"norm.weight": ["a", "b"]})
    yield "boolean size", lambda d: next(iter(d["axes"].values())).update(size=True)
    yield "too few dimensions", lambda d: next(iter(d["tensors"].values()))["dims"].pop()
    yield "another length", lambda d: next(iter(d["tensors"].values()))["dims"].__setitem__(0, 1)


@pytest.mark.parametrize("name, damage", list(mutations()), ids=[name for name, _ in mutations()])
def test_damaged_data_is_refused(name, damage):
    model, _, surgery = model_and_surgery()
    data = json.loads(json.dumps(surgery.plan().cuts.to_dict()))
    damage(data)
    before = state_of(model)
    with pytest.raises((ArtifactError, SurgeryError)):
        replay_(model, {"format": 1, "cuts": [data]})
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": 2, "cuts": [{}]}', b'{"format": 1, "cuts": []}', b"[" * 99999]
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "cuts.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        replay_(Model(), path)


def test_another_model_is_refused():
    _, _, surgery = model_and_surgery()
    with pytest.raises(SurgeryError):
        carry_out(nn.Linear(2, 2), surgery.plan().cuts)
    with pytest.raises(SurgeryError):
        carry_out(Model(width=16), surgery.plan().cuts)


def test_what_cannot_be_asked():
    model, graph, _ = model_and_surgery()
    other = Graph.trace(copy.deepcopy(model), IDS)
    group, frozen = graph.groups()[0], next(g for g in graph.all_groups if g.frozen)
    for bad, word in (
        ({}, "at least one"),
        ({group: []}, "left"),
        ({group: [0, 0]}, "different"),
        ({group: [group.size]}, "different"),
        ({frozen: [0]}, "cannot be cut"),
        ({group: [0], other.groups()[0]: [0]}, "another graph"),
    ):
        with pytest.raises(SurgeryError, match=word):
            Surgery(bad)


# Optimizers ------------------------------------------------------------------------------------------


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def steps(model, optimizer, n):
    generator = torch.Generator().manual_seed(n)
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_that_of_the_masked_model(name):
    """A step of the small model with migrated state is the masked model's with masked gradients."""
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    graph = Graph.trace(model, torch.zeros(1, 3, dtype=torch.float64))
    surgery = Surgery({g: [0, 3, 4, 7] for g in graph.groups()})
    plan = surgery.plan()
    names = [n for n, _ in model.named_parameters()]

    def masked(parameter, which):
        for d in range(parameter.dim()):
            gone = (~plan.keep(which, d)).nonzero().flatten()
            parameter.index_fill_(d, gone, 0)

    big = copy.deepcopy(model)
    big_optimizer = OPTIMIZERS[name](big.parameters())
    big_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for which, p in big.named_parameters():
            masked(p, which)
            for value in big_optimizer.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == p.shape:
                    masked(value, which)
    surgery.apply_(model, optimizer)
    for model_, optimizer_ in ((model, optimizer), (big, big_optimizer)):
        generator = torch.Generator().manual_seed(9)
        for _ in range(2):
            optimizer_.zero_grad()
            x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
            model_(x).square().sum().backward()
            for which, p in model_.named_parameters():
                if p.shape != dict(model.named_parameters())[which].shape:
                    masked(p.grad, which)  # else a bias that is zero would grow again
            optimizer_.step()
    for which in names:
        found, wanted = dict(model.named_parameters())[which], dict(big.named_parameters())[which]
        for d in range(found.dim()):
            wanted = wanted.index_select(d, plan.keep(which, d).nonzero().flatten())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def optimizer_state(optimizer):
    return (
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
        {id(p): {k: (id(v), copy.deepcopy(v)) for k, v in s.items()} for p, s in optimizer.state.items()},
    )


def assert_same_optimizer(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for key, entry in a[1].items():
        for name, (ident, value) in entry.items():
            assert b[1][key][name][0] == ident
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[1][key][name][1]))


def test_undo_gives_the_optimizer_back():
    model = small()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    steps(model, optimizer, 2)
    before = optimizer_state(optimizer)
    graph = Graph.trace(model, torch.zeros(1, 3, dtype=torch.float64))
    applied = Surgery({graph.groups()[0]: [1, 2]}).apply_(model, optimizer)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (2, 3)
    applied.undo()
    assert_same_optimizer(before, optimizer_state(optimizer))


# Failure at every step -------------------------------------------------------------------------------


STRIDE = 89


class Injected(BaseException):
    """As a keyboard interrupt would come."""


def failing_at(n):
    """A tracer that raises at the n-th line executed in the watched files, once."""
    counter = itertools.count()

    def local(frame, event, argument):
        if event == "line" and next(counter) == n:
            sys.settrace(None)
            raise Injected
        return local

    def tracer(frame, event, argument):
        return local if frame.f_code.co_filename.startswith(WATCHED) else None

    return tracer


def injected(lines):
    model, _, surgery = model_and_surgery()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(IDS).sum().backward()
    optimizer.step()
    model.zero_grad()
    model.train()
    cuts = surgery.plan().cuts
    assert cuts.swaps and cuts.attributes and cuts.scales
    before, state, config = state_of(model), optimizer_state(optimizer), dict(vars(model.config))
    modes = [m.training for m in model.modules()]
    done, trace = 0, sys.gettrace()
    for n in lines:
        try:
            sys.settrace(failing_at(n))
            applied = carry_out(model, cuts, [optimizer])
        except Injected:
            done += 1
        else:
            sys.settrace(trace)
            applied.undo()
            break
        finally:
            sys.settrace(trace)
        assert_same_state(before, state_of(model))
        assert_same_optimizer(state, optimizer_state(optimizer))
        assert vars(model.config) == config and model.heads == 4
        assert [m.training for m in model.modules()] == modes
        assert type(model.attention) is nn.MultiheadAttention
    else:
        raise AssertionError("carry_out has more lines than were tried")
    assert_same_state(before, state_of(model))
    assert_same_optimizer(state, optimizer_state(optimizer))
    return done


def test_failure_at_any_line_leaves_all_as_it_was():
    assert injected(range(int(torch.randint(STRIDE, ())), 10**6, STRIDE)) > 20


@pytest.mark.slow
def test_failure_at_every_line_leaves_all_as_it_was():
    assert injected(range(10**6)) > 1000
