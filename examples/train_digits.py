"""Prune while training, in a loop of your own: methods at 95 %, one shot, and a dense network as small.

pip install 'secateur[demo]' && python examples/train_digits.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

torch.set_num_threads(1)  # the tensors are small
STEPS, SPARSITY = 900, 0.95
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]


def network(width: int = 256) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 10)
    )


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        part = train[torch.randint(len(train), (64,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return (net(x[test]).argmax(1) == y[test]).float().mean().item()


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=2e-3)


def show(what: str, net: nn.Module) -> None:
    left = sum(int(p.count_nonzero()) for p in net.parameters())
    print(f"{what:<34}{left:>7,} weights   accuracy {accuracy(net):.3f}", flush=True)


dense = network()
fit(dense, adamw(dense))
show("dense", dense)

small = network(44)
fit(small, adamw(small))
show("dense, but small", small)

net = network()
fit(net, adamw(net))
masks = sc.prune_(net, sc.Magnitude(), SPARSITY, allocation=sc.global_).masks
show("one shot", net)

rise = sc.cubic(0, SPARSITY, begin=100, end=600)
methods: dict[str, Callable[[nn.Module], sc.Method]] = {
    "gradual magnitude": lambda m: sc.Gradual(
        m, sc.Magnitude(), rise, when=sc.every(20), allocation=sc.global_
    ),
    "movement": lambda m: sc.Movement(m, rise, rate=1e-2, allocation=sc.at_least(sc.global_, 0.01)),
    "RigL, sparse from the first step": lambda m: sc.Dynamic(
        m, sc.RigL(), SPARSITY, end=700, when=sc.every(20)
    ),
    "AC/DC": lambda m: sc.ACDC(
        m, sc.Magnitude(), SPARSITY, sc.phases(begin=100, period=80, dense_from=500, sparse_from=600)
    ),
}
for name, method_of in methods.items():
    net = network()
    method, optimizer = method_of(net), adamw(net)
    with method.attach(optimizer, steps=STEPS):
        fit(net, optimizer)
    show(name, net)
    if name == "gradual magnitude":
        sc.save(net, "gradual-digits", report=method.report())
