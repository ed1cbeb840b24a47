"""The engine for CPUs: continuous batching over packed tokens."""
