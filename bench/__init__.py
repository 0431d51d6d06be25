"""Benchmarks: `python -m bench` times every registered row and writes what it measured to bench/results/."""
