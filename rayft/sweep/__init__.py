"""Searching over methods, ranks, learning rates and seeds."""
