"""The model's dimensions typed by the computation, and the groups that must be cut in step."""

from secateur.graph.graph import Cost, Frozen, Graph
from secateur.graph.groups import Group, Member
from secateur.graph.oracle import Check
from secateur.graph.rules import Call, rule
from secateur.graph.types import Types

__all__ = ["Call", "Check", "Cost", "Frozen", "Graph", "Group", "Member", "Types", "rule"]
