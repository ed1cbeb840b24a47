"""The `data` section of a configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayft.config import SINCE, Section
from rayft.paths import PathText, check_text

__all__ = ["Columns", "DataConfig", "PartFiles", "ScorerConfig", "ScorerKind", "TooLong"]

TooLong = Literal["error", "drop", "cut"]
ScorerKind = Literal["exact", "contains", "regex", "number", "f1", "rouge_l", "json", "python"]
Format = Literal["auto", "prompt_completion", "messages", "text", "classification", "image_classification"]


class Columns(Section):
    """The names of the columns of a data set."""

    prompt: str = "prompt"
    """Column with the question to the model."""

    completion: str = "completion"
    """Column with the answer that the model should give."""

    messages: str = "messages"
    """Column with conversations: lists of {role, content}."""

    text: str = "text"
    """Column with raw texts, or with texts to classify."""

    image: str = "image"
    """Column with images."""

    label: str = "label"
    """Column with classes."""


class PartFiles(Section):
    """A file, folder of images or hub split for each part. Parts without one are split off `train`."""

    train: PathText
    """File, folder or split to train on."""

    val: PathText | None = None
    """File, folder or split for all decisions, such as early stopping and the choice of the winner."""

    test: PathText | None = None
    """File, folder or split for the scores that are reported."""


class ScorerConfig(Section):
    """How the answers to your own questions are scored, from 0 to 1."""

    kind: ScorerKind = "exact"
    """`exact`: the same text, ignoring case. `contains`: the answer contains the right one. `regex`: what
    `pattern` finds is the same. `number`: the last number in the answer is the right one. `f1`: words in
    common, as in SQuAD. `rouge_l`: longest common subsequence of words. `json`: equal as JSON. `python`: what
    `function` returns."""

    pattern: str = ""
    """Regular expression (Python's `re`) of `regex`. Its first group is compared, or the whole match if it
    has no group."""

    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Largest difference from the right number that `number` accepts."""

    function: str = ""
    """Function of `python`, as `path/to/file.py:name`. It is called as `name(answer, expected, question)`
    with three texts, and returns a number from 0 to 1, or a bool."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> ScorerConfig:
        for name, kind in (("pattern", "regex"), ("tolerance", "number"), ("function", "python")):
            if getattr(self, name) and self.kind != kind:
                raise ValueError(f"{name} is a setting of kind: {kind}; write that, or drop {name}")
        if self.kind == "regex":
            self._check_pattern()
        if self.kind == "python" and not all(self.function.rpartition(":")):
            raise ValueError("function is missing or names no function; write path/to/file.py:name")
        if self.kind == "python":
            check_text(self.file)
        return self

    def _check_pattern(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is missing; write a regular expression such as 'answer is (.+)'")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is not a regular expression ({error}); correct it") from error

    @property
    def file(self) -> str:
        """Path of the file of `function`; empty if there is none."""
        return self.function.rpartition(":")[0]

    def moved(self, file: str | Path) -> ScorerConfig:
        """Return the section with another path of the function's file."""
        return self.model_copy(update={"function": f"{file}:{self.function.rpartition(':')[2]}"})


class DataConfig(Section):
    """Which data to use, how to read it, and how much of it."""

    source: Literal["reasoning_gym", "hub", "jsonl", "csv", "parquet", "image_folder"] = "reasoning_gym"
    """The kind of data source that `name` refers to."""

    name: str = ""
    """A reasoning-gym task, a hub id (`org/set` or `org/set:config`), a file, or a folder of images.

    A folder has images as `class/file.png`, or as `train/class/file.png` with the same in `val` and `test`.
    """

    files: PartFiles | None = None
    """A file, folder or hub split for each part, instead of one that is split into parts."""

    params: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Options of a reasoning-gym task."""

    format: Format = "auto"
    """The kind of each example; `auto` finds it by the columns."""

    columns: Columns = Columns()
    """The names of the columns of a file or hub set."""

    rows: int | None = Field(default=None, ge=1, json_schema_extra={SINCE: "0.2"})
    """Number of rows to use of each file or hub split, from the first. A hub set is then streamed, so that
    no more of it is downloaded."""

    train: int | None = Field(default=None, ge=1)
    """Number of examples to train on. The default for files is all that are left."""

    val: int | None = Field(default=None, ge=1)
    """Number of examples for decisions. The default for files is a tenth."""

    test: int | None = Field(default=None, ge=1)
    """Number of examples for reported scores. The default for files is a tenth."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed that decides which examples are drawn, and to which part each belongs."""

    max_length: int = Field(default=512, ge=8)
    """Number of tokens in a row."""

    too_long: TooLong = Field(default="error", json_schema_extra={SINCE: "0.2"})
    """What to do with examples that are longer than a row. `cut` keeps the end of a conversation, so that
    answers stay whole, divides raw text into pieces, and keeps the start of a text to classify."""

    packing: bool = True
    """Whether several examples share a row. They never attend to each other."""

    score: Literal["strict", "native"] = "strict"
    """`strict` counts an answer only if it is fully right; `native` is reasoning-gym's partial credit."""

    scorer: ScorerConfig = Field(default=ScorerConfig(), json_schema_extra={SINCE: "0.2"})
    """How answers are scored, except those of reasoning-gym tasks and classes."""

    separator: str = "\n"
    """Text between prompt and completion, for tokenizers without a chat template."""

    @field_validator("name")
    @classmethod
    def _can_be_a_path(cls, name: str) -> str:
        return check_text(name) if name else name

    @model_validator(mode="after")
    def _of_one_kind(self) -> DataConfig:
        if self.source == "reasoning_gym":
            self._check_task()
            return self
        if self.params:
            raise ValueError(
                f"params are options of reasoning-gym tasks; '{self.source}' has none: drop them"
            )
        if self.scorer != ScorerConfig() and "classification" in self.format:
            raise ValueError("scorer is for answers, and classes are compared as they are: drop scorer")
        if self.score == "native":
            raise ValueError("score: native is for source: reasoning_gym; write strict")
        self._check_images()
        if self.rows is not None and self.source == "image_folder":
            raise ValueError(
                "rows are those of files and hub sets; limit a folder of images by train, val, test"
            )
        if self.source == "hub":
            if not self.name:
                raise ValueError("name is missing; write a hub id such as org/set")
        elif bool(self.name) == bool(self.files):
            kind = "folder" if self.source == "image_folder" else "file"
            raise ValueError(
                f"give one {kind} as name, or a {kind} for each part as files; not both, not neither"
            )
        return self

    def _check_images(self) -> None:
        if self.source == "image_folder" and self.format not in ("auto", "image_classification"):
            raise ValueError(f"format '{self.format}' does not fit image_folder: leave it at auto")
        if self.format == "image_classification" and self.source in ("jsonl", "csv"):
            raise ValueError(
                f"{self.source} holds no images; use source: image_folder, hub or parquet for images"
            )

    def _check_task(self) -> None:
        if not self.name:
            raise ValueError("name is missing; write a reasoning-gym task such as needle_haystack")
        if self.files is not None:
            raise ValueError(
                "files are for files and hub sets; give a reasoning-gym task train, val and test"
            )
        if self.scorer != ScorerConfig():
            raise ValueError(
                "reasoning-gym tasks have scorers of their own; drop scorer, and write score: native for "
                "partial credit"
            )
        if self.format not in ("auto", "prompt_completion"):
            raise ValueError(f"format '{self.format}' does not fit reasoning-gym: leave it at auto")
        if self.rows is not None:
            raise ValueError("rows are those of files and hub sets; give a task train, val and test")
        missing = [part for part in ("train", "val", "test") if getattr(self, part) is None]
        if missing:
            raise ValueError(f"a reasoning-gym task has no size of its own: give {', '.join(missing)}")

    def located(self) -> DataConfig:
        """Return the configuration with absolute paths of files."""
        if self.scorer.file:
            file = Path(self.scorer.file).expanduser().absolute()
            return self.model_copy(update={"scorer": self.scorer.moved(file)})._with_files()
        return self._with_files()

    def _with_files(self) -> DataConfig:
        if self.source in ("reasoning_gym", "hub"):
            return self
        name = str(Path(self.name).expanduser().absolute()) if self.name else ""
        files = self.files
        if files is not None:
            named = {part: path for part, path in files if path is not None}
            files = PartFiles(
                **{part: str(Path(path).expanduser().absolute()) for part, path in named.items()}
            )
        return self.model_copy(update={"name": name, "files": files})
