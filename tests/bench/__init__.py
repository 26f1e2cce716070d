"""Benchmarks: `python -m tests.bench.<theme>` writes `results/<theme>_<hardware>_<date>.json`."""
