"""Read a data set into three parts that share no question.

train gives gradients. val decides: learning rate, early stops, winner, squeeze floor, promotion.
test is read once, for the numbers that are reported. A question that stands in two parts stays in
test before val before train.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayft.data.example import Example, Image, Message, digest
from rayft.data.files import Table, read_file, read_hub
from rayft.data.folder import part_folders, read_image_folder
from rayft.data.formats import convert, find_format
from rayft.data.gym import draw_parts
from rayft.data.scorer import Scorer
from rayft.data.section import Columns, DataConfig, PartFiles
from rayft.errors import DataError
from rayft.numerics import derive_seed

__all__ = [
    "Columns",
    "DataConfig",
    "Example",
    "Image",
    "Message",
    "PartFiles",
    "Parts",
    "Scorer",
    "majority_answer",
    "read",
]

SHARE = 0.1
"""Of a file that is split, the part that val and test get each, where no size is given."""


@dataclass(frozen=True)
class Parts:
    """A data set, read. It pickles."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]
    digest: str
    """Identity (16 hex digits) of all examples of all parts, in order."""
    scorer: Scorer
    labels: tuple[str, ...] = ()
    """Names of the classes of a classification; their order numbers them."""
    dropped: int = 0
    """Repeated questions (or images) that were left out."""

    @property
    def has_images(self) -> bool:
        """Whether the examples are images."""
        return self.train[0].image is not None


def read(config: DataConfig) -> Parts:
    """Read what a configuration names.

    Raises:
        DataError: if anything of it is missing, wrong, or too small for its parts.
        ResourceError: if reasoning-gym is wanted and not installed.
    """
    if config.source == "reasoning_gym":
        assert config.test is not None
        assert config.val is not None
        assert config.train is not None
        sizes = {"test": config.test, "val": config.val, "train": config.train}
        found, dropped = draw_parts(config.name, config.params, sizes, config.seed, config.separator)
        scorer = Scorer(config.name, dict(config.params), strict=config.score == "strict")
    else:
        found, dropped = _split(_read_tables(config), config)
        scorer = Scorer()
    found, labels = _number_labels(found)
    train, val, test = (tuple(found[part]) for part in ("train", "val", "test"))
    return Parts(train, val, test, digest((train, val, test)), scorer, labels, dropped)


def majority_answer(parts: Parts) -> str:
    """Find the answer that is most frequent in train (the first of equals)."""
    return Counter(example.answer for example in parts.train).most_common(1)[0][0]


def _read_tables(config: DataConfig) -> dict[str, list[Example]]:
    """Read the examples of each part that has a file or split of its own."""
    tables = {part: _table(config, name) for part, name in _places(config).items()}
    first = tables["train"]
    form = find_format(first, config.columns) if config.format == "auto" else config.format
    return {part: convert(table, form, config.columns, config.separator) for part, table in tables.items()}


def _places(config: DataConfig) -> dict[str, str]:
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
    return read_hub(config.name, name) if config.source == "hub" else read_file(config.source, name)


def _split(found: dict[str, list[Example]], config: DataConfig) -> tuple[dict[str, list[Example]], int]:
    """Drop repeated questions, then give each part what it asks for."""
    seen: set[str] = set()
    unique = {part: _unseen(found[part], seen) for part in ("test", "val", "train") if part in found}
    dropped = sum(map(len, found.values())) - sum(map(len, unique.values()))
    pool = sorted(unique.pop("train"), key=lambda example: derive_seed("split", config.seed, example.key))
    total = len(pool)
    parts: dict[str, list[Example]] = {}
    for part in ("test", "val"):
        wanted: int | None = getattr(config, part)
        if part in unique:
            parts[part] = _take(unique[part], wanted, part, config.seed)
        else:
            size = wanted or max(1, round(SHARE * total))
            parts[part], pool = pool[:size], pool[size:]
            _check_size(parts[part], size, part, total)
    parts["train"] = pool if config.train is None else pool[: config.train]
    _check_size(parts["train"], config.train or 1, "train", total)
    return parts, dropped


def _unseen(examples: Sequence[Example], seen: set[str]) -> list[Example]:
    kept = []
    for example in examples:
        if example.key not in seen:
            seen.add(example.key)
            kept.append(example)
    return kept


def _take(examples: list[Example], wanted: int | None, part: str, seed: int) -> list[Example]:
    _check_size(examples, wanted or 1, part, len(examples))
    if wanted is None:
        return examples
    return sorted(examples, key=lambda example: derive_seed("split", seed, example.key))[:wanted]


def _check_size(examples: Sequence[Example], wanted: int, part: str, total: int) -> None:
    if len(examples) < wanted:
        raise DataError(
            f"too little data: {part} should have {wanted} examples and gets {len(examples)} of {total} "
            "different ones (repeated questions and those of test and val, don't count); ask for less"
        )


def _number_labels(parts: Mapping[str, list[Example]]) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """Number the classes by their names' order (numbers by value)."""
    names = {example.label_name for example in parts["train"]} - {""}
    if not names:
        return dict(parts), ()
    if len(names) < 2:
        raise DataError(f"all train examples are of one class, '{names.pop()}'; bring two classes or more")
    whole = all(re.fullmatch("-?[0-9]+", name) for name in names)
    labels = tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))
    index = {name: number for number, name in enumerate(labels)}
    for part, examples in parts.items():
        unknown = {example.label_name for example in examples} - names
        if unknown:
            raise DataError(
                f"{part} has classes that train has not: {', '.join(sorted(unknown))}; correct their "
                "spelling, or bring train examples of them"
            )
    numbered = {
        part: [replace(example, label=index[example.label_name]) for example in examples]
        for part, examples in parts.items()
    }
    return numbered, labels
