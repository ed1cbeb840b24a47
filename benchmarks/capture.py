"""Capture a step as a CUDA graph, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rayft.train.graphs import capture_stream

__all__ = ["capture"]


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run a step three times, then capture it, and return the graph."""
    graph = torch.cuda.CUDAGraph()
    with capture_stream():
        for _ in range(3):
            step()
        with torch.cuda.graph(graph):
            step()
    return graph
