"""Runs batches through a model and fills the statistics that criteria need."""

from secateur.collect.batches import Loss
from secateur.collect.run import Collected, collect

__all__ = ["Collected", "Loss", "collect"]
