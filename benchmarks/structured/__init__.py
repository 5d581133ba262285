"""Accuracy and latency of structured pruning on real models, against Torch-Pruning and random units.

    python -m benchmarks.structured [resnet20 minilm-sts minilm-banking smollm2 latency] [--methods ...]

Every method prunes a fresh copy of the same pretrained model to the same target, counted by the same counter,
and is then measured, repaired by the same normalisation statistics and fine-tuned by the same recipe with the
same seeds. Where a method has variants (criteria, scopes), the best is chosen for each cell on validation
data, never on test data. Cells are appended to `benchmarks/results/structured.jsonl` as they finish; a rerun
computes only what is missing; the tables are written to `benchmarks/results/structured.md`.
"""
