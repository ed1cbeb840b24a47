"""Rows → examples: which columns there must be, and what must stand in them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rayft.config import nearest
from rayft.data.example import Example, Image, Message
from rayft.data.files import Table
from rayft.data.section import Columns
from rayft.errors import DataError

__all__ = ["FORMATS", "convert", "find_format"]

ROLES = ("system", "user", "assistant")

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "image_classification": ("image", "label"),
    "text": ("text",),
}
"""The columns of each format, in the order in which `auto` looks for them."""


def find_format(table: Table, columns: Columns) -> str:
    """Tell the format of a table by its columns.

    Raises:
        DataError: if it has the columns of none.
    """
    for name, needed in FORMATS.items():
        if all(getattr(columns, field) in table.columns for field in needed):
            return name
    choices = "; ".join(" + ".join(getattr(columns, f) for f in needed) for needed in FORMATS.values())
    raise DataError(
        f"{table.name} has the columns {', '.join(table.columns)}, but needs one of: {choices}. "
        "Say what yours are called with data.columns"
    )


def convert(table: Table, form: str, columns: Columns, separator: str) -> list[Example]:
    """Make an example of each row; labels stay unnumbered.

    Raises:
        DataError: naming the file, row and column of the first one that is wrong.
    """
    for field in FORMATS[form]:
        column = getattr(columns, field)
        if column not in table.columns:
            raise DataError(
                f"{table.name} has no column '{column}', which format '{form}' needs; set "
                f"data.columns.{field} to what it is called{nearest(column, table.columns)}"
            )
    make = MAKERS[form]
    return [make(_Cell(table, index, columns), separator) for index in range(len(table.rows))]


class _Cell:
    """Reads typed values of one row."""

    def __init__(self, table: Table, index: int, columns: Columns) -> None:
        self.table, self.index, self.columns = table, index, columns

    def value(self, field: str) -> Any:
        """Get what stands in the column of a field."""
        return self.table.rows[self.index].get(getattr(self.columns, field))

    def error(self, field: str, problem: str) -> DataError:
        """Make an error that names file, row and column."""
        column = getattr(self.columns, field)
        return DataError(f"{self.table.place(self.index)}, column '{column}': {problem}")

    def text(self, field: str) -> str:
        """Get a text that is not blank."""
        value = self.value(field)
        if not isinstance(value, str):
            raise self.error(field, f"{_shown(value)} is no text; write a string")
        if not value.strip():
            raise self.error(field, f"the {field} is empty; fill it or drop the row")
        return value

    def label(self) -> str:
        """Get a class: a text, a whole number or a truth value."""
        value = self.value("label")
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int):
            return str(value)
        raise self.error("label", f"{_shown(value)} is no class; write a name or a whole number")

    def image(self) -> Image:
        """Get an image that Pillow knows; whether all of it is there shows when it is decoded."""
        import PIL.Image

        name, data = self._picture()
        try:
            image = Image.of(name, data)
            with PIL.Image.open(io.BytesIO(image.read())):
                return image
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{name} can't be read as an image ({error}): replace or remove it") from error

    def _picture(self) -> tuple[str, bytes | None]:
        """Get what an image is called and its bytes, or its path and None."""
        value = self.value("image")
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
        if data and isinstance(data, bytes):
            return self.table.place(self.index), data
        if data is not None or not path or not isinstance(path, str):
            raise self.error(
                "image",
                f"{_shown(value)} is no image; use source: image_folder, or a hub set or Parquet file that "
                "holds the images themselves",
            )
        file = self.table.file(path)
        if file is None:
            raise self.error(
                "image",
                f"'{path}' is a path on the machine where the set was made; take a set that holds the images "
                "themselves, or download them and use source: image_folder",
            )
        return str(file), None

    def messages(self) -> tuple[Message, ...]:
        """Get a conversation that the assistant ends."""
        value = self.value("messages")
        if not isinstance(value, list) or not value:
            raise self.error(
                "messages", f"{_shown(value)} is no list of {{role, content}}; write two or more"
            )
        turns = tuple(self._message(turn, number) for number, turn in enumerate(value, start=1))
        if turns[-1].role != "assistant":
            raise self.error(
                "messages",
                f"the last message is from '{turns[-1].role}', not from the assistant: there is nothing "
                "to learn; end the conversation with the answer",
            )
        if len(turns) < 2:
            raise self.error("messages", "there is only the answer; put the user's message before it")
        return turns

    def _message(self, turn: Any, number: int) -> Message:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise self.error("messages", f"message {number} is {_shown(turn)}, not {{role, content}} texts")
        if role not in ROLES:
            raise self.error("messages", f"message {number} has the role '{role}'{nearest(role, ROLES)}")
        if role == "assistant" and not content.strip():
            raise self.error("messages", f"message {number}: the answer is empty; fill it or drop the row")
        return Message(role, content)


def _shown(value: Any) -> str:
    text = repr(value)
    return "an empty cell" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _pair(cell: _Cell, separator: str) -> Example:
    turns = Message("user", cell.text("prompt")), Message("assistant", cell.text("completion"))
    return Example(messages=turns, separator=separator)


MAKERS: dict[str, Callable[[_Cell, str], Example]] = {
    "messages": lambda cell, separator: Example(messages=cell.messages(), separator=separator),
    "prompt_completion": _pair,
    "classification": lambda cell, _: Example(text=cell.text("text"), label_name=cell.label()),
    "image_classification": lambda cell, _: Example(image=cell.image(), label_name=cell.label()),
    "text": lambda cell, _: Example(text=cell.text("text")),
}
