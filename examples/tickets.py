"""Winning tickets in a convolutional network on digits: late rewinding, controls, barriers, a page.

pip install 'secateur[demo]' && python examples/tickets.py
"""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.ticket_page import plot_tickets

torch.set_num_threads(1)  # the tensors are small
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, held, test = order[:1000], order[1000:1200], order[1200:]


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def fit(model: nn.Module, trial: sc.Trial) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100, 130])
    for step in trial.steps(150, optimizer, scheduler):
        part = train[trial.batch(len(train), 50)]
        noise = 0.1 * torch.randn(x[part].shape, generator=trial.generator())
        optimizer.zero_grad()
        F.cross_entropy(model(x[part] + noise), y[part]).backward()
        optimizer.step()
        if step % 10 == 9:
            trial.log(loss=loss(model))


def loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        value = F.cross_entropy(model(x[held]), y[held])
    model.train()
    return value.item()


def accuracy(model: nn.Module) -> float:
    return (model(x[test]).argmax(1) == y[test]).float().mean().item()


out = sys.argv[1] if len(sys.argv) > 1 else "tickets"
run = sc.Lottery(
    network,
    fit,
    evaluate=accuracy,
    levels=3,
    rate=0.7,
    rewind=sc.rewind_to(20),
    seeds=range(3),
    controls=[sc.RandomTicket(), sc.Twin()],
)
table = run(f"{out}/runs")
paths = sc.barriers(run, f"{out}/runs", batches=[(x[train][:500], None)])
plot_tickets(table, f"{out}/runs", out, "a convolutional network on digits")
print(table)
worst = max(path.barrier for path in paths)
print(f"Highest barrier between a ticket and its twin: {100 * worst:.2f} points")
print(f"The page: {out}/tickets.html")
