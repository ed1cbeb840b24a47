"""Benchmarks. Each writes its results to `results/`, from which the tables of the documentation are made."""
