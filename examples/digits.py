"""Prune a network of your own, fine-tune it with the zeros held, save it. Runs in seconds on a laptop.

pip install 'secateur[demo]' && python examples/digits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

torch.manual_seed(0)
torch.set_num_threads(1)  # the tensors are small
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
train, test = slice(0, 1200), slice(1200, None)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        part = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return (net(x[test]).argmax(1) == y[test]).float().mean().item()


net = network()
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
fit(net, optimizer, 600)
print(f"dense              {accuracy(net):.3f}")

batches = list(zip(x[train].split(100), y[train].split(100), strict=True))
report = sc.prune_(net, sc.Taylor(), 0.9, allocation=sc.erk, batches=batches, loss=F.cross_entropy)
print(f"90 % removed       {accuracy(net):.3f}")

with report.masks.hold(net, optimizer):  # momentum and weight decay cannot bring a weight back
    fit(net, optimizer, 300)
print(f"after fine-tuning  {accuracy(net):.3f}")

report.masks.check(net)
print(report)
sc.save(net, "pruned-digits", report=report)
again = sc.load("pruned-digits", network())
assert accuracy(again) == accuracy(net)
