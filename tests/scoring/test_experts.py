"""Outputs of experts, against a loop over tokens and experts."""

import pytest
import torch
from torch import nn

from secateur.core.errors import StatsError
from secateur.scoring import ExpertOutput, score_groups
from tests.reference import Experts, close
from tests.scoring.standins import Group, Member, labels, seeded

STACK = ("gate_up_proj", "down_proj")


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=5,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return seeded(MixtralForCausalLM(config))


def group_of(prefix: str, size: int = 5) -> Group:
    return Group(prefix, "experts", size, tuple(Member(f"{prefix}.{t}", 0, "out") for t in STACK))


def test_experts_of_a_transformer_by_loops():
    model = mixtral()
    prefixes = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    groups = [group_of(p) for p in prefixes]
    calls: dict[str, list] = {p: [] for p in prefixes}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, args, p=p: calls[p].append(args))
        for p in prefixes
    ]
    ids = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    model(ids)
    for handle in handles:
        handle.remove()
    found = score_groups(model, groups, labels, ExpertOutput(), [ids[:2], ids[2:]])
    assert not any(m._forward_hooks for m in model.modules())
    for group in groups:
        stack = model.get_submodule(group.name)
        norms: list[list[float]] = [[] for _ in range(5)]
        for x, chosen, weights in calls[group.name]:
            for t in range(len(x)):
                for e, w in zip(chosen[t].tolist(), weights[t], strict=True):
                    gate, up = (stack.gate_up_proj[e] @ x[t]).chunk(2)
                    out = stack.down_proj[e] @ (stack.act_fn(gate) * up) * w
                    norms[e].append(float(out.detach().norm()))
        expected = torch.tensor([sum(n) / len(n) if n else 0.0 for n in norms])
        assert close(found[group].values, expected, 1e-4)
        idle = [e for e, n in enumerate(norms) if not n]
        assert [str(idle) in note for note in found[group].notes] == [True] * bool(idle)


class Stack(nn.Module):
    """Experts as stacks; `bent` adds the tokens, which no expert said."""

    def __init__(self, bent: bool = False) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 5, 5))
        self.bent = bent

    def forward(self, x, chosen, weights):
        out = torch.einsum("tkoi,ti->tko", self.down_proj[chosen], x)
        return (out * weights[..., None]).sum(1) + (x if self.bent else 0)


class Routed(nn.Module):
    def __init__(self, bent: bool = False) -> None:
        super().__init__()
        self.experts = Stack(bent)

    def forward(self, x):
        chosen = torch.zeros(len(x), 2, dtype=torch.long)
        chosen[:, 1] = 2
        return self.experts(x, chosen=chosen, weights=torch.full((len(x), 2), 0.5))


def test_experts_that_get_no_token_are_noted():
    model = Routed()
    group = Group("experts", "experts", 4, (Member("experts.down_proj", 0, "out"),))
    x = torch.randn(6, 5)
    found = score_groups(model, [group], labels, ExpertOutput(), [x])[group]
    outputs = 0.5 * torch.einsum("eoi,ti->eto", model.experts.down_proj.detach(), x).norm(dim=2).mean(1)
    assert close(found.values, outputs * torch.tensor([1, 0, 1, 0]), 1e-5)
    assert found.notes == ("No token was routed to 2 of 4 experts, which score 0: [1, 3].",)


def test_what_cannot_be_measured():
    stack = Group("experts", "experts", 4, (Member("experts.down_proj", 0, "out"),))
    with pytest.raises(StatsError, match=r"not the sum of its experts' weighted outputs.*JointTaylor"):
        score_groups(Routed(bent=True), [stack], labels, ExpertOutput(), [torch.randn(6, 5)])
    modules = Group("g", "experts", 2, (Member("router.weight", 0, "out"),))
    with pytest.raises(StatsError, match=r"not stacks of parameters in one module.*GroupScore\(Taylor\(\)\)"):
        score_groups(Experts(), [modules], labels, ExpertOutput(), [torch.randn(2, 3, 5)])

    class Dense(Routed):
        def forward(self, x):
            return torch.einsum("eoi,ti->to", self.experts.down_proj, x)

    with pytest.raises(StatsError, match="never called"):
        score_groups(Dense(), [stack], labels, ExpertOutput(), [torch.randn(6, 5)])

    class Masked(Routed):
        def forward(self, x):
            return self.experts(x, torch.zeros(len(x), 2, dtype=torch.bool).long()[:, 0], torch.ones(len(x)))

    class Loose(Stack):
        def forward(self, x, chosen, weights):
            return x

    model = Masked()
    model.experts = Loose()
    with pytest.raises(StatsError, match="Loose is not called with tokens"):
        score_groups(model, [stack], labels, ExpertOutput(), [torch.randn(6, 5)])
    assert not any(m._forward_hooks for m in model.modules())
