"""Benchmarks: ratios from interleaved runs, `python -m experiments.benchmarks.NAME`; each is importable as `run(quick)`."""
