"""The `data` section of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayft.config import Section
from rayft.paths import PathText, check_text

__all__ = ["Columns", "DataConfig", "PartFiles"]

Format = Literal["auto", "prompt_completion", "messages", "text", "classification", "image_classification"]


class Columns(Section):
    """What the columns of a data set are called."""

    prompt: str = "prompt"
    """Column of what the model is asked."""

    completion: str = "completion"
    """Column of what it should answer."""

    messages: str = "messages"
    """Column of conversations: lists of {role, content}."""

    text: str = "text"
    """Column of raw or classified text."""

    image: str = "image"
    """Column of images."""

    label: str = "label"
    """Column of classes."""


class PartFiles(Section):
    """Where each part is: a file, folder of images or hub split. A part left out is split off `train`."""

    train: PathText
    """File, folder or split to learn from."""

    val: PathText | None = None
    """File, folder or split for every choice that is made."""

    test: PathText | None = None
    """File, folder or split for the numbers that are reported."""


class DataConfig(Section):
    """Where the data is, how it is read, and how much of it."""

    source: Literal["reasoning_gym", "hub", "jsonl", "csv", "parquet", "image_folder"] = "reasoning_gym"
    """What kind of thing `name` is."""

    name: str = ""
    """A reasoning-gym task, a hub id (`org/set` or `org/set:config`), a file, or a folder of images.

    The folder holds `class/file.png`, or `train/class/file.png` and the same in `val` and `test`.
    """

    files: PartFiles | None = None
    """Files, folders or hub splits of the parts, instead of one that is split."""

    params: dict[str, int | float | str | bool] = Field(default_factory=dict)
    """Options of a reasoning-gym task."""

    format: Format = "auto"
    """What a row is; `auto` tells by its columns."""

    columns: Columns = Columns()
    """Names of the columns of a file or hub set."""

    train: int | None = Field(default=None, ge=1)
    """Examples to train on; of files, all that there are where not given."""

    val: int | None = Field(default=None, ge=1)
    """Examples to choose by; of files, a tenth where not given."""

    test: int | None = Field(default=None, ge=1)
    """Examples to report on; of files, a tenth where not given."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides which examples there are, and which part each is in."""

    max_length: int = Field(default=512, ge=8)
    """Tokens of a row; no example may be longer."""

    packing: bool = True
    """Put several examples into one row (they never see each other)."""

    score: Literal["strict", "native"] = "strict"
    """`strict` counts an answer only if it is fully right; `native` is reasoning-gym's partial credit."""

    separator: str = "\n"
    """What stands between prompt and completion where the tokenizer has no chat template."""

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
        if self.score == "native":
            raise ValueError("score: native is for source: reasoning_gym; write strict")
        self._check_images()
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
                f"{self.source} holds no images; use source: image_folder, hub or parquet for them"
            )

    def _check_task(self) -> None:
        if not self.name:
            raise ValueError("name is missing; write a reasoning-gym task such as needle_haystack")
        if self.files is not None:
            raise ValueError(
                "files are for files and hub sets; give a reasoning-gym task train, val and test"
            )
        if self.format not in ("auto", "prompt_completion"):
            raise ValueError(f"format '{self.format}' does not fit reasoning-gym: leave it at auto")
        missing = [part for part in ("train", "val", "test") if getattr(self, part) is None]
        if missing:
            raise ValueError(f"a reasoning-gym task has no size of its own: give {', '.join(missing)}")

    def located(self) -> DataConfig:
        """Make the paths of files absolute."""
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
