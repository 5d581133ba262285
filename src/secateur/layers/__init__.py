"""Depth pruning: whole blocks of a network found, scored and dropped."""

from secateur.layers.changes import Changes, Cut, Edit
from secateur.layers.choose import every_other, first_blocks, last_blocks, lowest
from secateur.layers.drop import DropRecord, drop_layers_, replay_
from secateur.layers.finding import Block, Stack, stacks
from secateur.layers.scores import angular_distance, block_influence, loss_increase
from secateur.layers.tensors import bypassed

__all__ = [
    "Block",
    "Changes",
    "Cut",
    "DropRecord",
    "Edit",
    "Stack",
    "angular_distance",
    "block_influence",
    "bypassed",
    "drop_layers_",
    "every_other",
    "first_blocks",
    "last_blocks",
    "loss_increase",
    "lowest",
    "replay_",
    "stacks",
]
