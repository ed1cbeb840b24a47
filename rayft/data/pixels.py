"""Prepare images for a vision model with the model's own image processor.

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

__all__ = ["MODES", "EncodedImage", "ImageEncoder", "Pixels", "encode_images", "size_and_mode"]

Pixels = npt.NDArray[np.float32]
"""(C, H, W), resized and normalised."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels of 8 bits → Pillow's mode."""

KEPT = 2**30
"""Most bytes of prepared pixels that an encoder keeps, so that small data sets are decoded only once."""


class ImageEncoder:
    """Decodes images and prepares them for a model.

    Images are rotated as their EXIF data says, and converted to the model's number of channels: colour to
    grey by luminance, grey to colour by repetition. Transparency is dropped.

    Args:
        processor: image processor of transformers, which resizes, crops, rescales and normalises.
        channels: number of channels of the model's input.

    Raises:
        DataError: if no image file has that many channels.
    """

    def __init__(self, processor: Any, channels: int) -> None:
        if channels not in MODES:
            raise DataError(f"the model takes images of {channels} channels; image files have 1, 3 or 4")
        self.processor, self.channels = processor, channels
        self._kept: dict[str, Pixels] = {}
        self._room = KEPT

    def pixels(self, image: Image) -> Pixels:
        """Return the pixels of an image: (C, H, W) float32.

        Raises:
            DataError: if the image can't be read or prepared; the message names it.
        """
        found = self._kept.get(image.digest)
        if found is None:
            found = self._prepare(image)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[image.digest] = found
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the settings of the processor to the folder of a model."""
        self.processor.save_pretrained(folder)

    def _prepare(self, image: Image) -> Pixels:
        import PIL.Image

        try:
            with PIL.Image.open(io.BytesIO(image.read())) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise DataError(
                        f"{image.name} has more than 8 bits a channel (mode {opened.mode}), which conversion "
                        "would clip: save it with 8 bits a channel"
                    )
                picture = _upright(opened).convert(MODES[self.channels])
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


def _upright(image: Any) -> Any:
    """Return an image of Pillow rotated as its EXIF data says.

    Pillow would write the data anew, without the orientation, and can't if a camera gave any of it an unusual
    type. So the data is read, and then removed.
    """
    import PIL.ImageOps

    image.getexif()
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)
    return PIL.ImageOps.exif_transpose(image)


def size_and_mode(image: Image) -> tuple[tuple[int, int], str]:
    """Return width and height of an image in pixels, as it is stored, and Pillow's mode, such as `RGB`."""
    import PIL.Image

    with PIL.Image.open(io.BytesIO(image.read())) as opened:
        return opened.size, opened.mode


@dataclass(frozen=True)
class EncodedImage:
    """An image to classify. It is a row of its own, and its pixels are prepared when a batch needs them."""

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
    """Decode all images of a part, so that a damaged file is found before training.

    Raises:
        DataError: if an image can't be read; the message names the first one.
    """
    found = []
    for example in examples:
        assert example.image is not None
        encoder.pixels(example.image)
        found.append(EncodedImage(example.image, example.label, encoder))
    return found
