"""The memory of adapters on a device: bytes that are taken once, and handed out and taken back."""

from __future__ import annotations

import threading

import torch

from rayft.serving.engine.api import NoRoomError

__all__ = ["ALIGNED", "Arena", "aligned"]

ALIGNED = 256
"""Every piece begins at a multiple of so many bytes."""


def aligned(nbytes: int) -> int:
    """Round a number of bytes up to a multiple of `ALIGNED`."""
    return -(-nbytes // ALIGNED) * ALIGNED


class Arena:
    """Hands out pieces of one block of memory: the first gap that is large enough. Threads may share it."""

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        """Take the memory.

        Args:
            nbytes: its size.
            device: the device that it is on.
        """
        self.memory = torch.empty(aligned(nbytes), dtype=torch.uint8, device=device)
        """All bytes (uint8)."""
        self._gaps = [(0, self.memory.numel())]
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Number of bytes that are not handed out."""
        return sum(size for _, size in self._gaps)

    def take(self, nbytes: int) -> int:
        """Hand out a piece, and return the place of its first byte.

        Raises:
            NoRoomError: if no gap is large enough.
        """
        size = aligned(nbytes)
        with self._lock:
            for index, (place, gap) in enumerate(self._gaps):
                if gap >= size:
                    self._gaps[index : index + 1] = [(place + size, gap - size)] if gap > size else []
                    return place
            raise NoRoomError(
                f"an adapter of {nbytes:,} bytes does not fit into the memory for adapters: {self.free:,} of "
                f"{self.memory.numel():,} bytes are free, not all of them in one piece; raise device_bytes"
            )

    def give(self, place: int, nbytes: int) -> None:
        """Take a piece back.

        Work that was launched before may still read it: whoever writes there next has to wait for that work.
        """
        with self._lock:
            joined: list[tuple[int, int]] = []
            for start, size in sorted([*self._gaps, (place, aligned(nbytes))]):
                if size and joined and sum(joined[-1]) == start:
                    joined[-1] = (joined[-1][0], joined[-1][1] + size)
                elif size:
                    joined.append((start, size))
            self._gaps = joined
