"""L0 gates on whole blocks: against autograd, and the model that is left against the gated one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import secateur as sc
from secateur.core.errors import BudgetError, SelectionError
from secateur.training.draws import generator_at
from tests.training.test_gates import data, train


class Residual(nn.Module):
    """Adds to its input; `post` normalises the sum."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.post = post

    def forward(self, x):
        y = self.down(F.gelu(self.up(x if self.post else self.norm(x))))
        return self.norm(x + y) if self.post else x + y


class Model(nn.Module):
    def __init__(self, blocks: int = 4, post: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 8)
        self.stack = nn.ModuleList(Residual(post) for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.stack:
            x = block(x)
        return self.head(x)


def traced(model):
    return sc.Graph.trace(model, torch.randn(2, 6))


def test_gradients_are_those_of_autograd():
    model = Model(2)
    l0 = sc.L0(model, traced(model), 0.5, begin=0, end=100, initial=0.3, blocks=("stack.0", "stack.1"))
    assert [(b.name, [t.name for t in b.writers]) for b in l0.blocks] == [
        (f"stack.{i}", [f"stack.{i}.down.weight", f"stack.{i}.down.bias"]) for i in range(2)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = l0.attach(optimizer)
    train(model, optimizer, 5)  # so that the multipliers are not zero
    dense = {n: w.clone() for n, w in l0._shadow.dense.items()}
    assert dense.keys() == {f"stack.{i}.down.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert all(float(l0._drawn[f"stack.{i}"]) > 0 for i in range(2)), "another seed: gates must be open"
    alpha = {name: l0._alpha[name].clone().requires_grad_() for name in l0._alpha.values}
    linear, square = (float(l0._multipliers[k]) for k in ("linear", "square"))

    def gate(name):
        generator = generator_at(0, name, 5)
        u = torch.rand(len(alpha[name]), generator=generator).clamp(1e-6, 1 - 1e-6)
        return (torch.sigmoid((u.log() - (1 - u).log() + alpha[name]) * 1.5) * 1.2 - 0.1).clamp(0, 1)

    def open_(name):
        return torch.sigmoid(alpha[name] - (2 / 3) * torch.tensor(0.1 / 1.1).log())

    weights = {n: w.clone().requires_grad_() for n, w in dense.items()}
    gated, kept = {}, 0.0
    for i, (group, _) in enumerate(l0.units.groups):
        z = gate(f"stack.{i}")
        gated[f"stack.{i}.down.weight"] = weights[f"stack.{i}.down.weight"] * gate(group.name) * z
        gated[f"stack.{i}.down.bias"] = weights[f"stack.{i}.down.bias"] * z
        kept = kept + (8 + 1 + 8) * open_(group.name).sum() * open_(f"stack.{i}")
    ahead = 1 - kept.squeeze() / (2 * 10 * 17) - 0.5 * 5 / 100
    assert ahead.item() == pytest.approx(l0.expected - l0.target, abs=1e-5)
    x, y = data(5)
    loss = F.cross_entropy(functional_call(model, gated, x), y) + linear * ahead + square * ahead**2
    loss.backward()

    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    l0.before_step(optimizer)
    for name, a in alpha.items():
        torch.testing.assert_close(l0._gradients[name].float(), a.grad, rtol=1e-3, atol=1e-6)
    for name, w in weights.items():
        torch.testing.assert_close(model.get_parameter(name).grad, w.grad, rtol=1e-4, atol=1e-7)
    attached.release()


@pytest.mark.parametrize("sparsity", [0.6, 0.95])
def test_what_is_dropped_and_shrunk_is_what_the_gates_closed(sparsity):
    """At 95 % units alone, of which one in ten stays in each block, would not reach the target."""
    model = Model()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 100)
    graph = traced(model)
    if sparsity == 0.95:
        with pytest.raises(BudgetError, match="unit of each group"):
            sc.L0(model, graph, sparsity, begin=20, end=250)
    l0 = sc.L0(model, graph, sparsity, begin=20, end=250, blocks="stack.*", when=sc.every(50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = data(10**6, 500)
    with l0.attach(optimizer):
        train(model, optimizer, 230)
        assert l0.expected == pytest.approx(l0.target, abs=0.15)
        with l0.settled(), torch.no_grad():
            settled = model(x)
        train(model, optimizer, 20, 230)
        train(model, optimizer, 50, 250)
    assert settled.isfinite().all()
    assert [c.step for c in l0.history] == [20, 70, 120, 170, 220, 250]
    asked = [sparsity * i / 230 for i in (0, 50, 100, 150, 200, 230)]
    assert [c.asked for c in l0.history] == pytest.approx(asked)
    for change in l0.history:
        assert change.layers.keys() == {t.name for t in l0.live.targets}
        units = [v for k, v in change.layers.items() if k.endswith("weight")]
        assert sum(units) / 4 == pytest.approx(change.sparsity, abs=1e-6)  # all of one size
    closed = l0.closed_blocks()
    assert closed and len(closed) < 4
    for name in closed:
        down = model.get_submodule(name).down
        assert not down.weight.any() and not down.bias.any()
        assert l0.closed()[f"neurons of {name}.up.weight"] == 0
    gone = sum(float((~k).sum()) for k in l0._kept().values()) * 17
    assert sparsity * l0.units.total <= gone < sparsity * l0.units.total + 17
    model.eval()
    with torch.no_grad():
        before = model(x)
        assert (before.argmax(1) == y).float().mean() > 0.8
    sc.shrink_(model, x, sc.Budget.params(1.0), criterion=l0, sparsity=l0.closed())
    sc.drop_layers_(model, closed, x)
    assert len(model.stack) == 4 - len(closed)
    inside = sum(17 * block.up.out_features for block in model.stack)
    assert inside == l0.units.total - gone
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_closing_takes_the_most_certain_blocks_and_no_more_than_the_target():
    model = Model()
    l0 = sc.L0(model, traced(model), 0.6, begin=0, end=10, blocks="stack.*")
    l0.step = 10
    for name, a in zip(("stack.0", "stack.1", "stack.2", "stack.3"), (-4.0, 2.0, -5.0, -3.0), strict=True):
        l0._alpha[name].fill_(a)
    assert l0.closed_blocks() == ("stack.0", "stack.2")  # a third would be 75 %
    l0._alpha["stack.0"].fill_(2.5)
    assert l0.closed_blocks() == ("stack.2", "stack.3")
    l0._alpha["stack.3"].fill_(1.0)
    assert l0.closed_blocks() == ("stack.2",)  # the others are rather open, and units can do the rest
    kept = l0._kept()
    assert (
        sum(int((~k).sum()) for k in kept.values()) == 24 and not kept["neurons of stack.2.up.weight"].any()
    )
    for name in ("stack.0", "stack.1", "stack.2", "stack.3"):
        l0._alpha[name].fill_(-5.0)
    l0.sparsity = 0.8
    assert len(l0.closed_blocks()) == 3  # one stays


def test_resumed_is_uninterrupted_bit_for_bit():
    def fresh():
        model = Model()
        l0 = sc.L0(model, traced(model), 0.7, begin=2, end=15, blocks="stack.*", rate=0.4)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), l0

    whole, optimizer, method = fresh()
    with method.attach(optimizer):
        train(whole, optimizer, 18)
    for stop in (1, 7, 16):
        model, optimizer, first = fresh()
        attached = first.attach(optimizer)
        train(model, optimizer, stop)
        attached.release()
        state = copy.deepcopy([x.state_dict() for x in (model, optimizer, first)])
        again, optimizer, second = fresh()
        for x, s in zip((again, optimizer, second), state, strict=True):
            x.load_state_dict(s)
        with second.attach(optimizer):
            train(again, optimizer, 18 - stop, stop)
        assert second.masks == method.masks and second.closed_blocks() == method.closed_blocks()
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_decoders_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
    )
    gpt2 = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    ids = torch.arange(24).view(2, 12)
    for model in (LlamaForCausalLM(llama), GPT2LMHeadModel(gpt2)):
        model.eval()  # no dropout, so that only the gates are random
        graph = sc.Graph.trace(model, input_ids=ids)
        l0 = sc.L0(
            model,
            graph,
            0.85,
            begin=1,
            end=30,
            rate=0.7,
            blocks=["*.layers.*" if model.config.model_type == "llama" else "*.h.*"],
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with l0.attach(optimizer):
            for _ in range(32):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        with torch.no_grad():
            before = model(input_ids=ids).logits
        closed = l0.closed_blocks()
        assert len(closed) == 2
        end = {"criterion": l0, "kinds": l0.kinds, "sparsity": l0.closed()}
        sc.shrink_(model, {"input_ids": ids}, sc.Budget.params(1.0), **end)
        record = sc.drop_layers_(model, closed, {"input_ids": ids})
        assert record.dropped == closed
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_what_cannot_close_is_refused():
    model = Model(post=True)
    with pytest.raises(SelectionError, match=r"stack\.0 changes the hidden state even when"):
        sc.L0(model, traced(model), 0.5, begin=0, end=9, blocks="stack.*")
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model = Model()
    with pytest.raises(SelectionError, match=r"No block that can be dropped is called 'stack\.9'"):
        sc.L0(model, traced(model), 0.5, begin=0, end=9, blocks=["stack.9"])
    with pytest.raises(BudgetError, match="one block of each stack and one unit"):
        sc.L0(model, traced(model), 0.99, begin=0, end=9, blocks="stack.*")
    narrow = nn.Sequential(Residual(False), Residual(False))
    for block in narrow:
        block.norm, block.up, block.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
    with pytest.raises(SelectionError, match="no weight of which it is known"):
        sc.L0(narrow, traced(narrow), 0.5, begin=0, end=9, blocks="*")
    lone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    with pytest.raises(SelectionError, match="no stack of blocks"):
        sc.L0(lone, traced(lone), 0.5, begin=0, end=9, blocks="*")
