"""Show what a model will see of a data set.

Of texts these are their lengths, their padding, and rows with what is learnt marked; of images their sizes
and modes; and of both the number of examples of each class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from rayft.data.example import Example, Image
from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded, PackedRow, padded
from rayft.data.pixels import EncodedImage, size_and_mode
from rayft.data.prepared import prepare
from rayft.data.source import PARTS
from rayft.data.template import IGNORED, Encoded
from rayft.data.texts import lengths_of, notes
from rayft.flow.config import TrainConfig
from rayft.models.files import cache_folder
from rayft.models.load import context_length, load_encoder, load_skeleton
from rayft.train.session import check_task

__all__ = ["DataView", "ImagePart", "ImageView", "PartView", "Run", "look"]

READ = 2000
"""Texts of which the share of learnt tokens is computed."""


@dataclass(frozen=True)
class PartView:
    """The lengths of a part with texts, in tokens."""

    name: str
    examples: int
    """Number of examples, before any is dropped for its length."""
    texts: int
    """Number of texts that are left of them: an example may be encoded as several texts."""
    tokens: int
    """Tokens of all of them."""
    learnt: float
    """Share of the tokens that are learnt, in the first `READ` texts."""
    median: int
    most: int
    """95 % of the texts are no longer."""
    longest: int


@dataclass(frozen=True)
class ImagePart:
    """The images of a part, as they are stored."""

    name: str
    examples: int
    """Number of images."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels of the smallest image, of the median one and of the largest, by area."""
    modes: Mapping[str, int]
    """Pillow's mode, such as `RGB` → number of images, the most frequent first."""


@dataclass(frozen=True)
class ImageView:
    """One image, as it is stored."""

    name: str
    """Its path, or its name in the data set."""
    size: tuple[int, int]
    """Width and height in pixels."""
    mode: str
    label: str
    """Name of its class."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all learnt, or all not."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class DataView:
    """What a model will see of a data set."""

    parts: tuple[PartView, ...] | tuple[ImagePart, ...]
    labels: Mapping[str, tuple[int, ...]]
    """Class → its number of examples in each part; empty if nothing is classified."""
    rows: int
    """Rows of an epoch of training."""
    steps: float
    """Optimizer steps of an epoch."""
    padding: float
    """Share of padding in the batches of an epoch, if each batch has all rows of a step; 0 for images."""
    notes: tuple[str, ...]
    """What was dropped or cut, and why."""
    examples: tuple[tuple[tuple[Run, ...], ...], ...]
    """For each row of text that is shown, its examples, as text."""
    classes: tuple[str, ...] = ()
    """Class of each of these rows; empty if nothing is classified."""
    images: tuple[ImageView, ...] = ()
    """The images that are shown; each is a row."""
    pixels: tuple[int, int, int] | None = None
    """Channels, height and width of each image as the model gets it; None for texts."""


def look(config: TrainConfig, rows: int) -> DataView:
    """Prepare the data of a configuration, and describe it.

    Args:
        config: names the model and the data.
        rows: number of training rows to return.

    Raises:
        RayftError: if model or data can't be read, or don't fit each other.
    """
    run = config.run(False)
    settings = load_skeleton(run.model).config
    encoder = load_encoder(run.model, settings)
    prepared = prepare(config.data, encoder, cache_folder())
    check_task(run, prepared.parts)
    context = context_length(run.model, settings, encoder)
    encoded = {part: prepared.encoded(part, context) for part in PARTS}
    stream = RowStream(
        encoded["train"], run.data.max_length, run.optim.rows_per_step, run.seed, packing=run.data.packing
    )
    epoch, step = stream.epoch(0), run.optim.rows_per_step
    shown, parts = epoch[:rows], prepared.parts
    examples = {name: getattr(parts, name) for name in PARTS}
    first, images = encoded["train"][0], parts.has_images
    return DataView(
        parts=tuple(_images(name, examples[name]) for name in PARTS)
        if images
        else tuple(_part(name, len(examples[name]), texts) for name, texts in encoded.items()),
        labels=_labels(parts.labels, examples),
        rows=len(epoch),
        steps=len(epoch) / step,
        padding=0.0 if images else _padding(epoch.tokens.tolist(), step),
        notes=(*(item.text for item in parts.dropped), *notes(encoded)),
        examples=tuple(
            tuple(tuple(_runs(example, encoder)) for example in row.examples)
            for row in shown
            if isinstance(row, PackedRow)
        ),
        classes=tuple(
            parts.labels[example.label]
            for row in shown
            if isinstance(row, PackedRow)
            for example in row.examples
            if example.label is not None
        ),
        images=tuple(
            ImageView(row.image.name, *size_and_mode(row.image), parts.labels[row.label or 0])
            for row in shown
            if isinstance(row, EncodedImage)
        ),
        pixels=first.pixels.shape if isinstance(first, EncodedImage) else None,
    )


def _images(name: str, examples: Sequence[Example]) -> ImagePart:
    found = [size_and_mode(example.image) for example in examples if isinstance(example.image, Image)]
    sizes = sorted((size for size, _ in found), key=lambda size: (size[0] * size[1], size))
    modes = Counter(mode for _, mode in found)
    return ImagePart(
        name, len(examples), (sizes[0], sizes[(len(sizes) - 1) // 2], sizes[-1]), dict(modes.most_common())
    )


def _labels(names: Sequence[str], examples: Mapping[str, Sequence[Example]]) -> dict[str, tuple[int, ...]]:
    counts = [Counter(example.label for example in part) for part in examples.values()]
    return {name: tuple(count[number] for count in counts) for number, name in enumerate(names)}


def _part(name: str, examples: int, texts: Sequence[AnyEncoded]) -> PartView:
    lengths = lengths_of(texts)
    read = [text for text in texts[:READ] if isinstance(text, Encoded)]
    learnt = sum(label != IGNORED for text in read for label in text.labels)
    median, most, longest = (
        np.quantile(lengths, (0.5, 0.95, 1), method="inverted_cdf") if len(lengths) else (0, 0, 0)
    )
    return PartView(
        name=name,
        examples=examples,
        texts=len(texts),
        tokens=int(lengths.sum()),
        learnt=learnt / max(1, sum(map(len, read))),
        median=int(median),
        most=int(most),
        longest=int(longest),
    )


def _padding(tokens: Sequence[int], rows: int) -> float:
    batches = [tokens[start : start + rows] for start in range(0, len(tokens), rows)]
    return 1 - sum(tokens) / sum(len(batch) * padded(batch) for batch in batches)


def _runs(example: Encoded, tokenizer: Any) -> Iterator[Run]:
    """Divide an example into what is learnt and what is not, as text."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield Run(tokenizer.decode([token for token, _ in run]), learnt)
