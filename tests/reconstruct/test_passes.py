"""Passes that begin in the middle of a model and stop early give what whole passes give, with less work."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from secateur.collect.batches import as_batches
from secateur.reconstruct import consumers_of, repair_
from secateur.reconstruct.measure import Tokens, measure_both
from secateur.reconstruct.order import order_of
from secateur.reconstruct.passes import chain_of
from secateur.reconstruct.solve import reconstruct
from secateur.reconstruct.twin import masked_twin

D, H = 8, 12


class Block(nn.Module):
    """Two stages: a mixer, and a hidden layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.up, self.down = (
            nn.Linear(D, H),
            nn.Linear(H, D),
            nn.Linear(D, H),
            nn.Linear(H, D),
        )

    def forward(self, x, scale=1.0):
        x = x + self.b(torch.tanh(self.a(x))) * scale
        return x + self.down(torch.relu_(self.up(x)))


class Deep(nn.Module):
    def __init__(self, n=5):
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(4, D),
            nn.ModuleList(Block() for _ in range(n)),
            nn.Linear(D, 3),
        )

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(x))


class Tuples(Deep):
    """Blocks return more than the hidden state, and a sum over the layers is used at the end."""

    def forward(self, x):
        x, all_of_them = self.embed(x), []
        for block in self.blocks:
            x, norm = self.one(block, x)
            all_of_them.append(norm)
        return self.head(torch.relu(x)) + sum(all_of_them)

    def one(self, block, x):
        x = block(x, scale=0.5)
        return x, x.norm()


class Masked(Deep):
    """Every block gets something that belongs to the batch, beside the hidden state."""

    def forward(self, x, mask):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scale=mask)
        return self.head(x)


class Skips(Deep):
    """What the second block returns is added before the last: the middle cannot be entered without it."""

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            kept = x if i == 1 else kept if i else None
            x = x * kept if i == 3 else x
        return self.head(x)


class Overwrites(Deep):
    """The hidden state is written to between the blocks."""

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            x += 1
        return self.head(x)


class Again(Deep):
    """The first block runs a second time, after the others."""

    def forward(self, x):
        x = self.embed(x)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.head(x)


class Pair(nn.Module):
    """Two stacks; all blocks of the second see what the first returns."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Deep(3).blocks, Deep(3).blocks
        self.embed, self.head = nn.Linear(4, D), nn.Linear(D, 3)

    def forward(self, x):
        x = y = self.embed(x)
        for block in self.encoder:
            x = block(x)
        for block in self.decoder:
            y = block(y) + x
        return self.head(y)


class Staged(nn.Module):
    """Convolutional blocks in sequences of sequences."""

    def __init__(self):
        super().__init__()
        one = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(4)]
        self.stem, self.stages = (
            nn.Conv2d(4, 4, 1),
            nn.Sequential(nn.Sequential(*one[:2]), nn.Sequential(*one[2:])),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.reshape(-1, 4, 1, 1).expand(-1, 4, 5, 5)
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Routed(Deep):
    """A block of the middle is called for some batches only."""

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x) if i != 2 or x.shape[0] > 6 else x
        return self.head(x)


def half(model, generator):
    """Half of every hidden feature goes, with its rows."""
    keeps, slices = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features == H:
            keeps[f"{name}.weight"] = torch.rand(H, generator=generator).argsort() < H // 2
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            keeps[f"{name}.weight"] = torch.rand(4, generator=generator).argsort() < 3
    for name, keep in keeps.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        before = {"b": "a", "down": "up"}.get(leaf)
        if before:
            slices[f"{parent}.{before}.weight", 0] = slices[f"{parent}.{before}.bias", 0] = keep
    return keeps, slices


def whole_passes(model, keeps, slices, data):
    """Repair by passes from the beginning to the end, one after the other."""
    consumers, _ = consumers_of(model, keeps)
    everything = slices | {(c.name, c.input_dim): keeps[c.name] for c in consumers}
    twin = masked_twin(model, everything)
    done = {}
    for stage in order_of(model, consumers, data).stages:
        both = measure_both(model, twin, [stage], data, Tokens(), several=True)
        for c in stage:
            weight, bias = model.get_parameter(c.name), model.get_parameter(c.bias)
            solved = reconstruct(
                weight.detach(), bias.detach(), keeps[c.name], both[c.name].whole, c.layout, 1e-4,
                everything.get((c.name, 1 - c.input_dim)), both[c.name].parts,
            )  # fmt: skip
            done[c.name], done[c.bias] = solved.weight, solved.bias
            rows = everything.get((c.name, 1 - c.input_dim))
            with torch.no_grad():
                kept = 1 if rows is None else rows.to(weight.dtype)
                twin.get_parameter(c.name).copy_((solved.weight.mT * kept).mT)
                twin.get_parameter(c.bias).copy_(solved.bias * kept)
    return done


@pytest.mark.parametrize("kind", [Deep, Tuples, Skips, Overwrites, Again, Pair, Staged, Routed])
def test_the_weights_are_those_of_whole_passes(kind, generator):
    torch.manual_seed(0)
    model = kind().double()
    keeps, slices = half(model, generator)
    data = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in (9, 5, 9, 7)]
    want = whole_passes(model, keeps, slices, as_batches(data, torch.device("cpu"), "Repair"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modules = {n: set(vars(m)) for n, m in model.named_modules()}
    report = repair_(model, keeps, data, slices=slices)
    assert {f"{r.name}" for r in report.layers} == {n for n in want if n.endswith("weight")}
    for name, p in model.named_parameters():
        expected = want.get(name, before[name])
        torch.testing.assert_close(
            p.detach(), expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert modules == {n: set(vars(m)) for n, m in model.named_modules()}


def test_a_pass_runs_no_block_that_is_done_and_none_that_comes_later(generator):
    model = Deep(6)
    keeps, slices = half(model, generator)
    runs = Counter()
    for i, block in enumerate(model.blocks):  # hooks are copied: the twin's blocks count too
        block.register_forward_pre_hook(lambda m, args, i=i: runs.update([i]))
        block.a.register_forward_pre_hook(lambda m, args, i=i: runs.update([("inside", i)]))
    data = [torch.randn(3, 4, generator=generator) for _ in range(4)]
    repair_(model, keeps, data, slices=slices)
    # Of each block: four batches in two stages and in the first stage of the next block, for both models; for
    # the order four batches, and for the chain one.
    work = [8 * 3 + 4 + 1] * 5 + [8 * 2 + 4 + 1]
    # The checks of all later stages begin at the beginning, and once more at the block before.
    checks = [9, 9 + 2, 8 + 3, 6 + 3, 4 + 3, 2 + 2]
    assert [runs["inside", i] for i in range(6)] == [a + b for a, b in zip(work, checks, strict=True)]


def test_the_chain_of_a_model(generator):
    x = torch.randn(3, 4, generator=generator)
    (batch,) = as_batches([x], torch.device("cpu"), "Repair")

    def chain(model):
        consumers, _ = consumers_of(model, half(model, generator)[0])
        return chain_of(model, consumers, batch)

    deep = chain(Deep(3))
    assert deep.blocks == ("blocks.0", "blocks.1", "blocks.2") and deep.follows == (False, True, True)
    assert deep.before["blocks.1.b.weight"] == deep.before["blocks.1.down.weight"] == 1
    pair = chain(Pair())
    assert pair.follows == (False, True, True, False, False, False)
    assert pair.last_before(5) == {2, 3, 4}
    assert chain(Again(3)).blocks == ("blocks.1", "blocks.2")
    assert chain(Staged()).blocks[0] == "stages.0.0.0" and all(chain(Staged()).follows[1:])


class Shuffling:
    """A loader that gives its batches in another order each time, the first one first."""

    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __iter__(self):
        first, *others = self.batches
        order = others[self.reads % len(others) :] + others[: self.reads % len(others)]
        self.reads += 1
        return iter([first, *order])


def test_a_loader_that_shuffles_is_read_once(generator):
    model = Masked().double()
    keeps, slices = half(model, generator)
    data = []
    for i in range(4):
        x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
        data.append({"x": x, "mask": torch.full((1, D), float(i + 1), dtype=torch.float64)})
    other = copy.deepcopy(model)
    repair_(model, keeps, data, slices=slices)
    repair_(other, keeps, Shuffling(data), slices=slices)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-9), name
