"""Floor 4: checkpoints pruned in the memory of one block."""

from secateur.checkpoint.prune import prune_checkpoint

__all__ = ["prune_checkpoint"]
