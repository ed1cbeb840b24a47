"""Write docs/configuration.md from the code: `python -m tests.docs.configuration_page`.

Keys, types, limits, defaults and meanings are those of the pydantic fields and their docstrings.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayft.config import SINCE, Section
from rayft.flow.config import PipelineConfig
from rayft.methods.section import MethodConfig
from rayft.serving.config import ServeConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

All keys of configurations. `python -m tests.docs.configuration_page` makes this page from the code.

A configuration is a YAML file. Commands also take single settings as `--set section.key=value`, with the
value in YAML, which override the file. An unknown key is an error that names the nearest valid one. Values
are not converted: `"8"` is not a number. Keys without an entry under "since" have been there since 0.1.0.

`rayft config my.yaml` shows the settings in force as YAML, each with the place that it comes from: the file,
`--set`, an environment variable, or the default. `rayft config --schema` prints the JSON Schema (draft
2020-12) of these keys, with which editors complete and check a configuration:

```bash
rayft config --schema > rayft.schema.json
```

```yaml
# yaml-language-server: $schema=rayft.schema.json
name: mine
```
"""
ROOTS = (
    (
        PipelineConfig,
        "A sweep or a run: `rayft sweep`, `train`, `data`, `squeeze`, `analyze`, `report`",
        "`rayft sweep NAME` takes a packaged configuration or a file with these keys. `rayft train` takes\n"
        "the same file and needs no `sweep`. The commands that continue a sweep read its own copy.",
    ),
    (
        ServeConfig,
        "A server: `rayft serve` and `serve/config.yaml`",
        "`rayft serve` takes a file with these keys, and `serve deploy` takes them as the arguments of the\n"
        "application.",
    ),
)
LIMITS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "Any": "any value"}


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    seen: dict[type[Section], str] = {}
    for root, title, text in ROOTS:
        sections = [*_sections(root, "", seen)]
        parts.append(f"## {title}\n\n{text}\n")
        for path, section in sections:
            if path:
                parts.append(f"### `{path}`\n\n{_sentence(section.__doc__ or '')}\n")
            rows = [_row(name, field, seen) for name, field in section.model_fields.items()]
            lines = ("| key | type | default | since | meaning |", "| --- | --- | --- | --- | --- |", *rows)
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _sections(
    section: type[Section], path: str, seen: dict[type[Section], str]
) -> Iterator[tuple[str, type[Section]]]:
    """Yield a section and those below it, each once, with the path of its first place."""
    if section in seen:
        return
    seen[section] = path
    yield path, section
    for name, field in section.model_fields.items():
        for inner, suffix in _below(field.annotation):
            yield from _sections(inner, f"{path}.{name}{suffix}".strip("."), seen)


def _below(annotation: Any) -> Iterator[tuple[type[Section], str]]:
    """Yield the sections in a type, each with the part of its path that stands for a key or an index."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, ""
        return
    suffix = {dict: ".NAME", Mapping: ".NAME", tuple: "[]", list: "[]"}.get(typing.get_origin(annotation), "")
    for option in typing.get_args(annotation):
        for inner, more in _below(option):
            yield inner, suffix + more


def _row(name: str, field: FieldInfo, seen: Mapping[type[Section], str]) -> str:
    extra = field.json_schema_extra
    since = str(extra.get(SINCE, "")) if isinstance(extra, dict) else ""
    limits = [
        f"{sign} {getattr(limit, attribute)}"
        for limit in field.metadata
        for kind, (sign, attribute) in LIMITS.items()
        if isinstance(limit, kind)
    ]
    kind = ", ".join((_type(field.annotation, seen), *limits))
    return f"| `{name}` | {kind} | {_default(field)} | {since} | {_meaning(field)} |"


def _type(annotation: Any, seen: Mapping[type[Section], str]) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType, typing.Annotated):
        options = inner[:1] if origin is typing.Annotated else inner
        return " or ".join(_type(option, seen) for option in options if option is not type(None))
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in inner)
    if origin in (dict, Mapping):
        return f"mapping of {_type(inner[1], seen)}"
    if origin in (tuple, list):
        fixed = Ellipsis not in inner and len(inner) > 1
        return f"list of {f'{len(inner)} × ' if fixed else ''}{_type(inner[0], seen)}"
    if annotation in seen:
        return f"[section](#{re.sub(r'[^a-z0-9_-]', '', seen[annotation].lower())})"
    return WORDS.get(getattr(annotation, "__name__", ""), "any value")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "–"
    if isinstance(value, Section):
        return "its defaults"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _meaning(field: FieldInfo) -> str:
    text = field.description or ""
    shared = re.fullmatch(r"As in `method\.(\w+)`\.", text)
    if shared:
        text = MethodConfig.model_fields[shared[1]].description or ""
    if not text:
        text = next((inner.__doc__ or "" for inner, _ in _below(field.annotation)), "")
    return _sentence(text)


def _sentence(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
