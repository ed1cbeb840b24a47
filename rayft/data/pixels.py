"""Images → what a vision model takes, by the model's own image processor.

Shapes: C channels, H × W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayft.data.example import Example, Image
from rayft.errors import DataError

__all__ = ["EncodedImage", "ImageEncoder", "Pixels", "encode_images"]

Pixels = npt.NDArray[np.float32]
"""(C, H, W), resized and normalised."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""What Pillow calls images of that many channels of 8 bits."""

KEPT = 2**30
"""Bytes of ready pixels that an encoder keeps, so that small data sets are decoded once."""


class ImageEncoder:
    """Decodes images and prepares them as their model wants it.

    Images are turned upright (EXIF), and converted to the model's number of channels: colour to grey
    by luminance, grey to colour by repetition, transparency dropped.

    Args:
        processor: transformers' image processor: it resizes, crops, rescales and normalises.
        channels: of the model's input.

    Raises:
        DataError: if no image has that many channels.
    """

    def __init__(self, processor: Any, channels: int) -> None:
        if channels not in MODES:
            raise DataError(f"the model takes images of {channels} channels; image files have 1, 3 or 4")
        self.processor, self.channels = processor, channels
        self._kept: dict[str, Pixels] = {}
        self._room = KEPT

    def pixels(self, image: Image) -> Pixels:
        """Give an image's pixels: (C, H, W) float32.

        Raises:
            DataError: naming the image, if it can't be read or prepared.
        """
        found = self._kept.get(image.digest)
        if found is None:
            found = self._prepare(image)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[image.digest] = found
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the processor's settings beside a model."""
        self.processor.save_pretrained(folder)

    def _prepare(self, image: Image) -> Pixels:
        import PIL.Image
        import PIL.ImageOps

        try:
            with PIL.Image.open(io.BytesIO(image.read())) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{image.name} has more than 8 bits a channel (mode {opened.mode}), which conversion "
                        "would clip: save it with 8 bits a channel"
                    )
                picture = PIL.ImageOps.exif_transpose(opened).convert(MODES[self.channels])
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise DataError(
                f"{image.name} can't be read as an image ({error}): replace or remove it"
            ) from error
        try:
            found = self.processor(images=[picture], return_tensors="np")["pixel_values"][0]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the model's image processor refuses {image.name} in {MODES[self.channels]}: {error}; check "
                "image_mean, image_std and size in its preprocessor_config.json"
            ) from error
        return np.ascontiguousarray(found, dtype=np.float32)


@dataclass(frozen=True)
class EncodedImage:
    """An image to classify: a row of its own; its pixels are made when a batch wants them."""

    image: Image
    label: int | None
    encoder: ImageEncoder

    @property
    def pixels(self) -> Pixels:
        """(C, H, W) float32; see `ImageEncoder.pixels`."""
        return self.encoder.pixels(self.image)

    def __len__(self) -> int:
        return 1


def encode_images(examples: Sequence[Example], encoder: ImageEncoder) -> list[EncodedImage]:
    """Decode the images of a part once, so that a damaged file is found before training.

    Raises:
        DataError: naming the first image that can't be read.
    """
    found = []
    for example in examples:
        assert example.image is not None
        encoder.pixels(example.image)
        found.append(EncodedImage(example.image, example.label, encoder))
    return found
