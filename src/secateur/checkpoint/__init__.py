"""Floor 4: checkpoints pruned in the memory of one block."""

from secateur.checkpoint.output import amend
from secateur.checkpoint.prune import prune_checkpoint
from secateur.checkpoint.source import Source

__all__ = ["Source", "amend", "prune_checkpoint"]
