"""LoRA on a pruned model: trained and merged under the masks, so that pruned weights stay zero.

An adapter adds a product of two thin matrices to a weight, and that product has no zeros. Merged as it is, it
fills the pruned weights again; masked at the merge, it is not what was trained. Held, the model that trains
is already the one that will be merged.
"""

from secateur.lora.adapters import LoraError
from secateur.lora.hold import LoraHold, hold_lora
from secateur.lora.merge import Merged, merge_lora_

__all__ = ["LoraError", "LoraHold", "Merged", "hold_lora", "merge_lora_"]
