"""Benchmarks of Secateur on real pretrained models and real data (not part of the installed package)."""
