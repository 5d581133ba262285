"""Floor 4: models in folders. Safetensors and JSON, checked by size and hash, never a pickle."""

from secateur.artifacts.hf import task_of
from secateur.artifacts.loading import load, load_hf
from secateur.artifacts.saving import save

__all__ = ["load", "load_hf", "save", "task_of"]
