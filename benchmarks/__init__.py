"""Benchmarks: each writes its results to `results/`, from which the README's tables are made."""
