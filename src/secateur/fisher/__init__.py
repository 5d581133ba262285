"""Second-order pruning with data: the inverse of the empirical Fisher matrix, block by block.

- `inverse.py`: the blocks of one layer: scores, and what the kept weights do for the removed ones.
- `estimate.py`: the blocks of all layers, from gradients of batches.
- `prune.py`: pruning a model by them.
"""

from secateur.fisher.inverse import InverseFisher
from secateur.fisher.prune import prune_fisher_

__all__ = ["InverseFisher", "prune_fisher_"]
