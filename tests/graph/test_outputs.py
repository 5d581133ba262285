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


def test_what_holds_parameters_back_is_listed_and_kernels_are_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5))
    rows = {row.reason: row for row in sc.Graph.trace(model, torch.zeros(1, 3, 4, 4)).frozen()}
    assert rows.keys() == {"a dimension of the input", "a dimension of the model's output"}
    convolution, linear, total = 3 * 8 * 9, 8 * 4 * 5, sum(p.numel() for p in model.parameters())
    given, returned = rows["a dimension of the input"], rows["a dimension of the model's output"]
    assert given.tensors == ("0.weight",) and given.share == convolution / total
    assert returned.tensors == ("3.weight", "3.bias") and returned.share == (linear + 5) / total
