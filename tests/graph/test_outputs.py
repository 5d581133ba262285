"""What a model returns keeps its meaning: dimensions, and what the numbers in it count."""

import torch
from torch import nn

import secateur as sc


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x).relu()).argmax(-1)


def test_classes_that_are_returned_by_their_number_are_frozen():
    graph = sc.Graph.trace(Classifier(), torch.zeros(3, 6))
    assert [g.size for g in graph.groups()] == [8]
    (reason,) = {g.frozen for g in graph.all_groups if g.size == 4}
    assert "numbers in the model's output" in reason
