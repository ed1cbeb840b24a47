"""Capture a step as a CUDA graph, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["capture"]


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run a step three times on a side stream, then capture it, and return the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
