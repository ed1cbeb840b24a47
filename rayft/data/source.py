"""Read a data set into three parts that share no question.

The train part is used for gradients. The val part decides on learning rate, early stopping, winner, squeeze
floor and promotion. The test part is read once, for the scores that are reported. `split` explains how
repeated examples are handled.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayft.data.example import Example, Image, Message, digest
from rayft.data.files import Table, read_file, read_hub
from rayft.data.folder import part_folders, read_image_folder
from rayft.data.formats import convert, find_format
from rayft.data.gym import draw_parts
from rayft.data.scorer import Scorer, scorer_of
from rayft.data.section import Columns, DataConfig, PartFiles, ScorerConfig
from rayft.data.split import Dropped, split
from rayft.errors import DataError

__all__ = [
    "PARTS",
    "Columns",
    "DataConfig",
    "Dropped",
    "Example",
    "Image",
    "Message",
    "PartFiles",
    "Parts",
    "Scorer",
    "ScorerConfig",
    "majority_answer",
    "places",
    "read",
]


PARTS = ("train", "val", "test")
SHOWN = 8
"""Most classes that a message names."""


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set. They can be pickled."""

    train: Sequence[Example]
    val: Sequence[Example]
    test: Sequence[Example]
    digest: str
    """Hash of all examples of all parts, in order, and of how answers are scored (16 hex digits)."""
    digests: Mapping[str, str]
    """The same of each part alone, and of `scorer` if answers are not compared exactly."""
    scorer: Scorer
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; empty if nothing is classified."""
    dropped: tuple[Dropped, ...] = ()
    """The examples that were left out, and why."""

    def scored_by(self, scorer: Scorer) -> Parts:
        """Return these parts with a scorer, and add it to their digests, which must cover no scorer yet.

        Scores by another scorer are then never taken for scores on the same data. An exact match changes no
        digest.
        """
        if not scorer.identity:
            return replace(self, scorer=scorer)
        if self.labels:
            raise DataError("data.scorer is for answers, and classes are compared as they are: drop it")
        own, all_parts = (
            hashlib.sha256(text.encode()).hexdigest()[:16]
            for text in (scorer.identity, f"{self.digest}\0{scorer.identity}")
        )
        return replace(self, scorer=scorer, digest=all_parts, digests={**self.digests, "scorer": own})

    @property
    def has_images(self) -> bool:
        """Whether the examples are images."""
        return self.train[0].image is not None

    @property
    def asks(self) -> bool:
        """Whether the examples have answers, which can be scored; raw text has none."""
        return not self.test[0].is_raw


def read(config: DataConfig) -> Parts:
    """Read the data of a configuration and divide it into parts.

    Raises:
        DataError: if any of it is missing, wrong, or too small for its parts.
        ResourceError: if reasoning-gym is needed and not installed.
    """
    # Before the data is read, because a mistake in it is found at once.
    scorer = scorer_of(config.scorer)
    if config.source == "reasoning_gym":
        assert config.test is not None
        assert config.val is not None
        assert config.train is not None
        sizes = {"test": config.test, "val": config.val, "train": config.train}
        found, dropped = draw_parts(config.name, config.params, sizes, config.seed, config.separator)
        scorer = Scorer(config.name, dict(config.params), strict=config.score == "strict")
    else:
        found, dropped = split(_read_tables(config), config)
    found, labels = _number_labels(found)
    train, val, test = (tuple(found[part]) for part in PARTS)
    digests = {part: digest((found[part],)) for part in PARTS}
    parts = Parts(train, val, test, digest((train, val, test)), digests, Scorer(), labels, dropped)
    return parts.scored_by(scorer)


def majority_answer(parts: Parts) -> str:
    """Return the most frequent answer in the train part; the first one if several are."""
    return Counter(example.answer for example in parts.train).most_common(1)[0][0]


def _read_tables(config: DataConfig) -> dict[str, tuple[Table, list[Example]]]:
    """Read the table and the examples of each part that has a file or split of its own."""
    tables = {part: _table(config, name) for part, name in places(config).items()}
    first = tables["train"]
    form = find_format(first, config.columns) if config.format == "auto" else config.format
    return {
        part: (table, convert(table, form, config.columns, config.separator))
        for part, table in tables.items()
    }


def places(config: DataConfig) -> dict[str, str]:
    """Return the file, folder or hub split of each part that has one."""
    if config.files is None:
        if config.source == "image_folder":
            return part_folders(config.name)
        return {"train": "train" if config.source == "hub" else config.name}
    named = {"train": config.files.train, "val": config.files.val, "test": config.files.test}
    return {part: name for part, name in named.items() if name is not None}


def _table(config: DataConfig, name: str) -> Table:
    assert config.source != "reasoning_gym"
    if config.source == "image_folder":
        return read_image_folder(name)
    if config.source == "hub":
        return read_hub(config.name, name, config.rows)
    return read_file(config.source, name, config.rows)


def _number_labels(parts: Mapping[str, list[Example]]) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Number the classes in the order of their names, which is by value if all names are integers."""
    names = {example.label_name for example in parts["train"]} - {""}
    if not names:
        return dict(parts), ()
    if len(names) < 2:
        raise DataError(f"all train examples are of one class, '{names.pop()}'; provide two classes or more")
    # Python does not convert texts of more digits to integers.
    whole = all(re.fullmatch("-?[0-9]{1,4300}", name) for name in names)
    labels = tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))
    index = {name: number for number, name in enumerate(labels)}
    for part, examples in parts.items():
        unknown = {example.label_name for example in examples} - names
        if unknown:
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            otherwise = "" if examples[0].image else ", or set data.format: text if they are no classes"
            raise DataError(
                f"{part} has classes that train has not: {', '.join(sorted(unknown)[:SHOWN])}{more}; correct "
                f"their spelling, or add examples of them to train{otherwise}"
            )
    numbered = {
        part: [replace(example, label=index[example.label_name]) for example in examples]
        for part, examples in parts.items()
    }
    return numbered, labels
