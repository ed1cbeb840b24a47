"""How long a device computes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Times what is launched on a device, without waiting for it.

    On a GPU the seconds are those of the current stream, from what was launched before to what was launched
    last, so they don't depend on when they are read; elsewhere they are those of the host.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._began = self._mark()

    def stop(self) -> Callable[[], float]:
        """Stop; the function that is returned waits for the device, and returns the seconds."""
        began, ended = self._began, self._mark()

        def seconds() -> float:
            if isinstance(began, float) or isinstance(ended, float):
                return ended - began  # type: ignore[operator]
            ended.synchronize()
            milliseconds: float = began.elapsed_time(ended)
            return milliseconds / 1e3

        return seconds

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
