"""Draw images of stripes: `python make_images.py FOLDER` writes `FOLDER/CLASS/NUMBER.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import PIL.Image

EACH = 100
"""Images of each class."""
SIZE = 8
"""Width and height in pixels."""


def draw(random: np.random.Generator, *, vertical: bool) -> PIL.Image.Image:
    """Draw bright stripes of two pixels on a dark ground, with noise."""
    stripes = np.where((np.arange(SIZE) + random.integers(4)) // 2 % 2, 200, 50)
    pixels = np.tile(stripes, (SIZE, 1)) if vertical else np.tile(stripes[:, None], (1, SIZE))
    return PIL.Image.fromarray((pixels + random.integers(-40, 40, pixels.shape)).astype(np.uint8))


def main(folder: Path) -> None:
    """Write the images of both classes."""
    random = np.random.default_rng(0)
    for name in ("horizontal", "vertical"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            draw(random, vertical=name == "vertical").save(folder / name / f"{number}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
