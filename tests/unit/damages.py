"""Ways in which a file is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["DAMAGES", "empty", "garbage", "half", "one_bit", "zeroed"]


def empty(path: Path) -> None:
    """Leave nothing, as a disk that was full."""
    path.write_bytes(b"")


def half(path: Path) -> None:
    """Leave the first half, as a copy that was cut off."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def garbage(path: Path) -> None:
    """Leave bytes that are no text, of about the same size."""
    path.write_bytes(b"\xff\x00" * (path.stat().st_size // 2 + 1))


def zeroed(path: Path) -> None:
    """Leave the size and zeros, as a power cut before the blocks were written."""
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path: Path) -> None:
    """Change one bit in the middle; text may still mean what it meant."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 5] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: tuple[Callable[[Path], None], ...] = (empty, half, garbage, zeroed, Path.unlink)
"""Those that hold for every file."""
