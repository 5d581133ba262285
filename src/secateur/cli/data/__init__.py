"""A data file as batches for a Hugging Face model, with the loss of its task."""

from secateur.cli.data.batches import Data, example_input, mean_loss
from secateur.cli.data.overlap import overlap_note
from secateur.cli.data.own_text import SELF
from secateur.cli.data.read import open_tokenizer, read_data

__all__ = ["SELF", "Data", "example_input", "mean_loss", "open_tokenizer", "overlap_note", "read_data"]
