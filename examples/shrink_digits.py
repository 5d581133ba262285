"""Make a convolution network smaller for real: filters and neurons go, and it is fine-tuned afterwards.

pip install 'secateur[demo]' && python examples/shrink_digits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

torch.manual_seed(0)
torch.set_num_threads(1)  # the tensors are small
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train, test = slice(0, 1200), slice(1200, None)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Network(nn.Module):
    """With a residual connection, which ties filters of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.last = conv(1, 32), conv(32, 64), conv(64, 32)
        self.hidden, self.head = nn.Linear(32 * 16, 128), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)
        features = features + self.last(self.inside(features))
        features = F.max_pool2d(features, 2).flatten(1)
        return self.head(F.relu(self.hidden(features)))


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    net.train()
    for _ in range(steps):
        part = torch.randint(0, 1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
    net.eval()


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return (net(x[test]).argmax(1) == y[test]).float().mean().item()


net = Network()
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
fit(net, optimizer, 300)
print(f"dense              {accuracy(net):.3f}")

graph = sc.Graph.trace(net, x[:1])
for group in graph.groups():
    places = ", ".join(f"{m.tensor}[{m.dim}]" for m in group.members)
    print(f"{group}: {places}")

batches = list(zip(x[train].split(100), y[train].split(100), strict=True))
report = sc.shrink_(
    net,
    x[:1],
    sc.Budget.macs(0.25),
    criterion=sc.Taylor(),
    kinds=None,  # the filters along the residual connection too
    batches=batches,
    loss=F.cross_entropy,
    optimizer=optimizer,  # its moments are cut with the weights
)
print(report)
print(f"a quarter left     {accuracy(net):.3f}")

fit(net, optimizer, 150)
print(f"after fine-tuning  {accuracy(net):.3f}")

sc.save(net, "small-digits", report=report)
again = sc.load("small-digits", Network())  # the class as it was written: the file says what is left
assert accuracy(again.eval()) == accuracy(net)
