"""Convert rows to examples: the columns that each format needs, and the values that they may have."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from rayft.config import lone_surrogate, nearest
from rayft.data.example import REASONING, Example, Image, Message
from rayft.data.files import Table, parse_json
from rayft.data.section import Columns
from rayft.errors import DataError

__all__ = ["CONTEXT", "FORMATS", "convert", "find_format"]

ROLES = ("system", "user", "assistant", "tool")

MASKS = ("weight", "train", "loss_mask")
"""Keys of a message that decide whether it is learnt; their values are 0, 1, false or true."""

EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that chat templates read, in addition to role and content."""

MEANT = (
    "audio", "audios", "chat_template_kwargs", "documents", "functions", "images", "loss_mask", "system",
    "tools", "train", "videos", "weight",
)  # fmt: skip
"""Columns that would change what is learnt. If a format does not read them, they are errors, not ignored."""

CONTEXT = ("context", "history", "input", "instruction")
"""Columns that often belong to the question, if no column is called `prompt`."""

OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
               "developer": "system", "function": "tool"}  # fmt: skip
"""Role of another format → the role that it is here."""

MAX_DEPTH = 100
"""Most levels of lists and objects in a cell; conversations and tool schemas have far fewer."""

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "image_classification": ("image", "label"),
    "text": ("text",),
}
"""The columns of each format, in the order in which `auto` looks for them."""


def find_format(table: Table, columns: Columns) -> str:
    """Return the format of a table, which is found by its columns.

    Raises:
        DataError: if the table does not have the columns of any format.
    """
    for name, needed in FORMATS.items():
        if all(getattr(columns, field) in table.columns for field in needed):
            return name
    choices = "; ".join(" + ".join(getattr(columns, f) for f in needed) for needed in FORMATS.values())
    # Spaces around a name would not be seen.
    names = ", ".join(name if name == name.strip() else repr(name) for name in table.columns)
    raise DataError(
        f"{table.name} has the columns {names}, but needs one of: {choices}. Set data.columns to the names "
        "of yours"
    )


def convert(table: Table, form: str, columns: Columns, separator: str) -> list[Example]:
    """Convert each row to an example. Labels have names but no numbers yet.

    Args:
        table: the rows.
        form: a key of `FORMATS`.
        columns: the names of the columns.
        separator: the `separator` of the examples.

    Raises:
        DataError: with the file, row and column of the first value that is wrong.
    """
    for field in FORMATS[form]:
        column = getattr(columns, field)
        if column not in table.columns:
            raise DataError(
                f"{table.name} has no column '{column}', which format '{form}' needs; set "
                f"data.columns.{field} to the name of that column{nearest(column, table.columns)}"
            )
    named = [getattr(columns, field) for field in FORMATS[form]]
    if len({*named}) < len(named):
        fields = " and ".join(FORMATS[form])
        raise DataError(f"data.columns names '{named[0]}' for both {fields}; name a column for each")
    _check_columns(table, form, columns)
    make = MAKERS[form]
    return [make(_Cell(table, index, columns), separator) for index in range(len(table.rows))]


def _check_columns(table: Table, form: str, columns: Columns) -> None:
    """Raise an error for columns that would change what is learnt but that the format does not read."""
    if form not in ("messages", "prompt_completion"):
        return
    read = {getattr(columns, field) for field in FORMATS[form]} | ({"tools"} if form == "messages" else set())
    part_of_question = form == "prompt_completion" and columns.prompt != Columns().prompt
    for column in (*MEANT, *(CONTEXT if part_of_question else ())):
        if column not in table.columns or column in read:
            continue
        index = next(
            (i for i, row in enumerate(table.rows) if row.get(column) not in (None, "", [], {})), None
        )
        if index is not None:
            remedy = "write it into the prompt, or " if column in CONTEXT else ""
            raise DataError(
                f"{table.place(index)}, column '{column}': format '{form}' does not read it, so it would "
                f"have no effect; {remedy}remove the column, or rename it if it means something else"
            )


class _Cell:
    """Reads typed values of one row."""

    def __init__(self, table: Table, index: int, columns: Columns) -> None:
        self.table, self.index, self.columns = table, index, columns

    def value(self, field: str) -> Any:
        """Return the value in the column of a field; raises the errors of `column`."""
        return self.column(getattr(self.columns, field))

    def column(self, name: str) -> Any:
        """Return the value in a column, or None if there is no such column.

        Raises:
            DataError: if the value has text that is not valid Unicode, or is nested too deeply.
        """
        found = self.table.rows[self.index].get(name)
        if problem := _invalid(found):
            raise DataError(f"{self.table.place(self.index)}, column '{name}': {problem}")
        return found

    def error(self, field: str, problem: str) -> DataError:
        """Return an error that names the file, row and column."""
        column = getattr(self.columns, field)
        return DataError(f"{self.table.place(self.index)}, column '{column}': {problem}")

    def text(self, field: str) -> str:
        """Return a text that is not blank."""
        value = self.value(field)
        if isinstance(value, list):
            raise self.error(
                field,
                f"{_shown(value)} is no text; write a string, or turns as one list in a column '"
                f"{self.columns.messages}'",
            )
        if not isinstance(value, str):
            raise self.error(field, f"{_shown(value)} is no text; write a string")
        if not value.strip():
            raise self.error(field, f"the {field} is empty; fill it or drop the row")
        return value

    def raw(self) -> str:
        """Return a text to continue. It may be blank, as lines of corpora often are: `split` drops it."""
        value = self.value("text")
        return "" if value is None or (isinstance(value, str) and not value.strip()) else self.text("text")

    def label(self) -> str:
        """Return the name of a class: a text, an integer or a boolean."""
        value = self.value("label")
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int):
            return str(value)
        raise self.error("label", f"{_shown(value)} is no class; write a name or a whole number")

    def image(self) -> Image:
        """Return an image whose format Pillow knows. Whether it is truncated shows when it is decoded."""
        import PIL.Image

        name, data = self._picture()
        try:
            image = Image.of(name, data)
            with PIL.Image.open(io.BytesIO(image.read())):
                return image
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise DataError(f"{name} can't be read as an image ({error}): replace or remove it") from error

    def _picture(self) -> tuple[str, bytes | None]:
        """Return the name and the bytes of an image, or its path and None."""
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
        """Return a conversation, from a list or its JSON text, whose last turn is the assistant's."""
        value = self.value("messages")
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = self._json(f"column '{self.columns.messages}'", value)
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
        if not any(turn.learn for turn in turns if turn.role == "assistant"):
            raise self.error(
                "messages",
                "none of the assistant's messages is to be learnt; drop the row, or let one be learnt",
            )
        return turns

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the descriptions of tools from a list or its JSON text; empty if there is no such column."""
        value = self.column("tools")
        if isinstance(value, str) and value.strip():
            value = self._json("tools", value)
        if value is None or value == "":
            return ()
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise DataError(
                f"{self.table.place(self.index)}, column 'tools': {_shown(value)} is no list of tools; write "
                "a list of JSON schemas as OpenAI has them"
            )
        return tuple(value)

    def _json(self, what: str, text: str) -> Any:
        place = f"{self.table.place(self.index)}, {what}"
        value = parse_json(text, f"{place}: {_shown(text)}")
        if problem := _invalid(value):
            raise DataError(f"{place}: {problem}")
        return value

    def _message(self, turn: Any, number: int) -> Message:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or not isinstance(role, str):
            hint = ""
            if isinstance(turn, dict) and "from" in turn:
                hint = "; rename from to role (human to user, gpt to assistant), and value to content"
            raise self.error(
                "messages", f"message {number} is {_shown(turn)}, not {{role, content}} texts{hint}"
            )
        if role not in ROLES:
            ours = OTHER_ROLES.get(role)
            hint = f"; write '{ours}'" if ours else nearest(role, ROLES)
            raise self.error("messages", f"message {number} has the role '{role}'{hint}")
        # Formats with a fixed schema have null for every key that a message lacks.
        given = {key: value for key, value in turn.items() if value is not None}
        known = ("role", "content", *MASKS, *EXTRAS)
        for key in given:
            if key not in known:
                raise self.error(
                    "messages",
                    f"message {number} has the key '{key}', which is not known and would have no effect"
                    f"{nearest(key, known)}",
                )
        content = given.get("content", "" if "tool_calls" in given else None)
        if not isinstance(content, str):
            hint = "; write the text itself, without a list of parts" if isinstance(content, list) else ""
            raise self.error(
                "messages", f"message {number} is {_shown(turn)}, not {{role, content}} texts{hint}"
            )
        if role == "assistant" and not content.strip() and "tool_calls" not in given:
            raise self.error("messages", f"message {number}: the answer is empty; fill it or drop the row")
        return Message(role, content, self._learn(given, role, number), self._extras(given, role, number))

    def _learn(self, given: dict[str, Any], role: str, number: int) -> bool:
        """Return whether a message is learnt, which its mask decides."""
        masks = {key: given[key] for key in MASKS if key in given}
        for key, value in masks.items():
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise self.error(
                    "messages",
                    f"message {number} has {key} {_shown(value)}; write 0 or false to mask it, 1 or true to "
                    "learn it (nothing between)",
                )
        if len(set(map(bool, masks.values()))) > 1:
            raise self.error(
                "messages", f"message {number}: {' and '.join(masks)} contradict each other; keep one"
            )
        if role != "assistant" and any(masks.values()):
            raise self.error(
                "messages",
                f"message {number} is from '{role}' and has {next(iter(masks))} "
                f"{_shown(next(iter(masks.values())))}, "
                "but only the assistant's messages can be learnt; remove it",
            )
        return all(masks.values())

    def _extras(self, given: dict[str, Any], role: str, number: int) -> dict[str, Any]:
        """Return the keys that chat templates read, in addition to role and content."""
        extras = {key: given[key] for key in EXTRAS if key in given}
        belongs = {"tool_calls": "assistant", "tool_call_id": "tool"} | dict.fromkeys(REASONING, "assistant")
        for key, value in extras.items():
            if belongs.get(key, role) != role:
                raise self.error(
                    "messages",
                    f"message {number} has '{key}', which belongs to a message from '{belongs[key]}'",
                )
            if key != "tool_calls" and not isinstance(value, str):
                raise self.error("messages", f"message {number}: {key} is {_shown(value)}, not a text")
        if len(extras.keys() & set(REASONING)) > 1:
            raise self.error("messages", f"message {number} has its reasoning twice; keep one of the keys")
        if "tool_calls" in extras:
            extras["tool_calls"] = self._tool_calls(extras["tool_calls"], number)
        return extras

    def _tool_calls(self, value: Any, number: int) -> list[dict[str, Any]]:
        """Return tool calls with their arguments as objects, which templates write as JSON."""
        calls = []
        for entry in value if isinstance(value, list) else [None]:
            call = entry if isinstance(entry, dict) else {}
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise self.error(
                    "messages",
                    f"message {number}: tool_calls is {_shown(value)}; write a list of {{type, function: "
                    "{name, arguments}}",
                )
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):
                arguments = self._json(f"message {number}, arguments of {function['name']}", arguments)
            if not isinstance(arguments, dict):
                raise self.error(
                    "messages", f"message {number}: the arguments {_shown(arguments)} are no object"
                )
            calls.append({**call, "function": {**function, "arguments": arguments}})
        if not calls:
            raise self.error("messages", f"message {number}: tool_calls is empty; remove it or name a call")
        return calls


def _invalid(value: Any) -> str:
    """Return a description of what no later step can read in a cell; empty if there is nothing.

    That is text that is not valid Unicode, numbers inside of lists and objects that JSON doesn't have, and
    nesting that is too deep for recursive functions.
    """
    left: list[tuple[Any, str, int]] = [(value, "", 0)]
    while left:
        item, where, depth = left.pop()
        problem = ""
        if isinstance(item, str):
            problem = lone_surrogate(item)
        elif depth > MAX_DEPTH:
            return f"the value is nested more than {MAX_DEPTH} deep; write a flatter one"
        elif isinstance(item, dict):
            left += ((inner, f"{where}.{name}", depth + 1) for name, inner in item.items())
            # Check keys before values: messages about values contain the keys.
            left += ((name, where, depth) for name in item)
        elif isinstance(item, list | tuple):
            left += ((inner, f"{where}[{number}]", depth + 1) for number, inner in enumerate(item))
        elif isinstance(item, float) and depth and not math.isfinite(item):
            problem = f"{item} is no number of JSON; write another value, or null"
        if problem:
            return f"at {where}, {problem}" if where else problem
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return "an empty cell" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _pair(cell: _Cell, separator: str) -> Example:
    turns = Message("user", cell.text("prompt")), Message("assistant", cell.text("completion"))
    return Example(messages=turns, separator=separator)


MAKERS: dict[str, Callable[[_Cell, str], Example]] = {
    "messages": lambda cell, separator: Example(
        messages=cell.messages(), separator=separator, tools=cell.tools()
    ),
    "prompt_completion": _pair,
    "classification": lambda cell, _: Example(text=cell.text("text"), label_name=cell.label()),
    "image_classification": lambda cell, _: Example(image=cell.image(), label_name=cell.label()),
    "text": lambda cell, _: Example(text=cell.raw()),
}
