"""Networks with their groups written down by hand, and slow definitions of scores over them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Member:
    tensor: str
    dim: int
    role: str


@dataclass(frozen=True, eq=False)
class Group:
    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    units: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)  # where it is not one index a unit


def labels(group: Group, tensor: str, dim: int) -> Tensor:
    return group.units.get((tensor, dim), torch.arange(group.size))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, norms and their statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator) * 0.5)
                if "running_var" in name:
                    t.abs_().add_(0.5)
    return module.eval()


def mlp() -> tuple[nn.Module, list[Group]]:
    model = seeded(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    first = Group(
        "first",
        "neurons",
        6,
        (Member("0.weight", 0, "out"), Member("0.bias", 0, "along"), Member("2.weight", 1, "in")),
    )
    second = Group(
        "second",
        "neurons",
        4,
        (Member("2.weight", 0, "out"), Member("2.bias", 0, "along"), Member("4.weight", 1, "in")),
    )
    return model, [first, second]


def cnn() -> tuple[nn.Module, list[Group]]:
    """conv-BN-conv-flatten-linear; the second convolution has two groups."""
    model = seeded(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 4, 3),
        )
    )
    norm = [Member(f"1.{t}", 0, "along") for t in ("weight", "bias", "running_mean", "running_var")]
    first = Group(
        "first",
        "filters",
        4,
        (Member("0.weight", 0, "out"), Member("0.bias", 0, "along"), *norm, Member("3.weight", 1, "in")),
    )
    second = Group(
        "second",
        "filters",
        6,
        (Member("3.weight", 0, "out"), Member("6.weight", 1, "in")),
        {("6.weight", 1): torch.arange(6).repeat_interleave(4)},
    )
    return model, [first, second]


class Attention(nn.Module):
    """Four query heads of size 3 over two key-value heads, with a residual stream of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 12)
        self.k = nn.Linear(8, 6)
        self.v = nn.Linear(8, 6)
        self.o = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        self.gates: Tensor | None = None  # [examples, heads], for the tests

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, dim=1) for f in (self.k, self.v))
        a = F.softmax(q @ k.transpose(-1, -2) / 3**0.5, dim=-1) @ v
        if self.gates is not None:
            a = a * self.gates[:, :, None, None]
        x = x + self.o(a.transpose(1, 2).reshape(n, t, 12))
        return self.head(x.mean(1))


def attention() -> tuple[Attention, list[Group]]:
    heads = torch.arange(4).repeat_interleave(3)
    rows = [("q.weight", 0, "out"), ("q.bias", 0, "along"), ("o.weight", 1, "in")]
    keys = [(f"{m}.{t}", 0, "along" if t == "bias" else "out") for m in "kv" for t in ("weight", "bias")]
    pairs = torch.arange(2).repeat_interleave(3)
    queries = Group(
        "queries", "queries", 4, tuple(Member(*m) for m in rows), {(t, d): heads for t, d, _ in rows}
    )
    kv = Group(
        "kv",
        "kv_groups",
        2,
        tuple(Member(*m) for m in rows + keys),
        {(t, d): heads // 2 for t, d, _ in rows} | {(t, d): pairs for t, d, _ in keys},
    )
    model = seeded(Attention())
    assert isinstance(model, Attention)
    return model, [queries, kv]


def entries(model: nn.Module, group: Group, unit: int, member: Member) -> tuple[Tensor, Tensor]:
    """A member parameter and the mask of its entries that belong to a unit."""
    tensor = model.get_parameter(member.tensor).detach()
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    for i, u in enumerate(labels(group, member.tensor, member.dim).tolist()):
        if u == unit:
            mask.select(member.dim, i).fill_(True)
    return tensor, mask


def parameters(model: nn.Module, group: Group, roles: Iterable[str] = ("out", "in", "along")) -> list[Member]:
    names = dict(model.named_parameters(remove_duplicate=False))
    return [m for m in group.members if m.tensor in names and m.role in roles]


def example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of each example's loss by parameter name."""
    model = copy.deepcopy(model).requires_grad_(True)
    found = []
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def by_loop(group: Group, score: Callable[[int], float | Tensor]) -> Tensor:
    return torch.tensor([float(score(u)) for u in range(group.size)], dtype=torch.float64)
