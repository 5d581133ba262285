"""Pruning while training, method beside method, at equal epochs; see `benchmarks/training/__main__.py`."""
