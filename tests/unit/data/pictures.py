"""Small images and folders of them, for the tests of image data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from rayft.data.example import Example, Image
from rayft.numerics import derive_seed

Bytes = npt.NDArray[np.uint8]


def noise(*seed: object, shape: tuple[int, ...] = (8, 8)) -> Bytes:
    """Return random pixels that depend on the seed."""
    return np.random.default_rng(derive_seed(*seed)).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: Bytes) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def save(path: Path, pixels: Bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels))
    return path


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 10) -> Path:
    """Write `class/number.png` with different images, and return the folder."""
    for name in classes:
        for number in range(each):
            save(root / name / f"{number}.png", noise(root.name, name, number))
    return root


def example(pixels: Bytes, label: int | None = 0, name: str = "made") -> Example:
    return Example(image=Image.of(name, png(pixels)), label=label, label_name=str(label))
