"""Read strict YAML into frozen pydantic models. Each layer defines its own section; this module only reads.

A section is a subclass of `Section`. `load` reads YAML, applies `--set a.b=c` overrides, and validates in
strict mode, which does not convert "8" to 8. All problems are reported in one `ConfigError`, with a line for
each that names the dotted path and, for an unknown key, the nearest valid one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import numbers
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rayft.callable_package import make_callable
from rayft.errors import ConfigError
from rayft.files import write_file
from rayft.paths import read_path

__all__ = [
    "FORMER",
    "SINCE",
    "Record",
    "Section",
    "config_errors",
    "config_text",
    "content_hash",
    "flatten",
    "in_one_line",
    "leaves",
    "load",
    "lone_surrogate",
    "nearest",
    "overridden",
    "parse",
    "read_yaml",
    "yaml_line",
    "yaml_text",
]

SectionT = TypeVar("SectionT", bound="Section")

SINCE = "since"
"""Key in a field's `json_schema_extra`: the version that added the field, if it was added after 0.1.0."""
FORMER = "former"
"""Key in a field's `json_schema_extra`: the default that the field had before, if that has changed."""
SHOWN = 3
"""Number of problems that a message in one line has."""


class Section(BaseModel):
    """A frozen part of a configuration. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Record(Section):
    """Results that are saved as JSON. NaN and infinities, which JSON lacks, are saved as strings."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    def write(self, path: Path) -> Path:
        """Write the record to a file with `write_file`, and return the path."""
        return write_file(path, self.model_dump_json(indent=1) + "\n")


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads `1e-3` as a float and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping.

        Raises:
            ConfigError: if a key occurs twice.
        """
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"line {line}: the key '{key}' occurs twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that puts the text `1e-3` into quotes, since `_Loader` would read a float."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_yaml(text: str, source: str = "configuration") -> dict[str, Any]:
    """Parse YAML text into a mapping.

    Raises:
        ConfigError: if the text is not YAML, is not a mapping, or repeats a key.
    """
    try:
        # _Loader derives from SafeLoader, which builds only plain data.
        data = yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:
        # The parser converts dates and numbers: 2024-13-45 is a ValueError.
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply; sections have a few levels") from error
    except ConfigError as error:
        raise ConfigError(f"{source}, {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a mapping of sections, not {type(data).__name__}")
    return data


def yaml_text(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, which `read_yaml` reads as the same mapping, with its keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def yaml_line(value: Any) -> str:
    """Return a value as YAML on one line, which `read_yaml` reads as the same value."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # YAML's own style for a text with line breaks takes several lines.
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def load(
    cls: type[SectionT], path: str | Path, overrides: Sequence[str] = (), *, base: str | None = None
) -> SectionT:
    """Read a YAML file into `cls`, and apply `overrides`.

    Args:
        cls: the section to read.
        path: the file.
        overrides: settings as `a.b=c`, with the value in YAML.
        base: the names of the packaged configurations, for the message about a missing file.

    Raises:
        ConfigError: if the file is missing, or anything in it or in an override is wrong.
    """
    path = read_path(path, "the configuration")
    return parse(cls, read_yaml(config_text(path, base=base), str(path)), overrides)


def config_text(path: Path, *, base: str | None = None) -> str:
    """Read the text of a configuration file; arguments and errors are those of `load`."""
    try:
        if not path.is_file():
            hint = f"; the packaged ones are in {base}" if base else ""
            raise ConfigError(f"no configuration file at {path}{hint}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as UTF-8 text: {error}") from error


def parse(cls: type[SectionT], data: Mapping[str, Any], overrides: Sequence[str] = ()) -> SectionT:
    """Validate a mapping as `cls` after applying `overrides`.

    Raises:
        ConfigError: with one line for each problem.
    """
    merged = overridden(data, overrides)
    try:
        # Validation as JSON is strict about scalars, but accepts a list for a tuple and a string for a path.
        return cls.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        problems = [_describe(cls, merged, problem) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from error


@contextmanager
def config_errors(where: str = "") -> Iterator[None]:
    """Raise a ConfigError for settings that a block finds to be wrong when it builds sections of others.

    Args:
        where: what the message begins with.
    """
    try:
        yield
    except ValidationError as error:
        raise ConfigError(where + "; ".join(_problems(error))) from error


def in_one_line(error: Exception) -> str:
    """Return an error as one line; a `ValidationError` as its first problems with their places."""
    if not isinstance(error, ValidationError):
        return (str(error).splitlines() or [type(error).__name__])[0]
    first, more = _problems(error)[:SHOWN], error.error_count() - SHOWN
    return "; ".join(first) + (f"; and {more} more" if more > 0 else "")


def _problems(error: ValidationError) -> list[str]:
    found = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        message = str(problem["msg"]).removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return found


def overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a mapping as values of JSON, after applying `overrides` to it.

    Raises:
        ConfigError: if a text is not valid Unicode, or an override can't be applied.
    """
    merged: dict[str, Any] = _plain(data)
    for override in overrides:
        _apply(merged, override)
    return merged


def _plain(value: Any, where: str = "") -> Any:
    """Copy values of YAML as values of JSON: keys become text, and dates stay as they were written.

    Raises:
        ConfigError: if a text is not valid Unicode, or a value contains itself.
    """
    try:
        if isinstance(value, Mapping):
            return {_text(str(key), where): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(inner, where) for inner in value]
    except RecursionError:
        raise ConfigError(f"{where[:80].strip('.')}: nested too deeply, or within itself") from None
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int | float | None):
        return value
    # Numbers of numpy, as programs have them.
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value)


def _text(text: str, where: str) -> str:
    """Join surrogate pairs, which is what YAML makes of JSON's escapes of an emoji.

    Raises:
        ConfigError: if the text has only half of a pair.
    """
    problem = lone_surrogate(text)
    if not problem:
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where.strip('.') or 'configuration'}: {problem}") from error


def lone_surrogate(text: str) -> str:
    """Describe the first lone surrogate in a text, which is not valid Unicode; empty if there is none.

    Such text comes from escapes in JSON and YAML, and from file names and arguments that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, near = ord(text[error.start]), text[max(error.start - 20, 0) : error.start + 20]
        return (
            f"character {error.start + 1} is the lone surrogate U+{code:04X} (in {near!a}), half of a "
            "character; write the whole one, or remove it"
        )
    return ""


def _apply(data: dict[str, Any], override: str) -> None:
    if problem := lone_surrogate(override):
        raise ConfigError(f"--set: {problem}")
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"'{override}' is not an override; write section.key=value")
    keys = name.strip().split(".")
    node = data
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        child = node[key]
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: '{key}' holds a value, not a section, so nothing can be set below it")
        node = child
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader, see read_yaml)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: the value '{text[:200]}' is not valid YAML") from error
    node[keys[-1]] = _plain(value, name)


def _describe(cls: type[Section], data: Mapping[str, Any], problem: Mapping[str, Any]) -> str:
    location = _location(data, problem)
    where = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        # The key may be valid in another member of a union.
        valid = _keys_at(cls, location[:-1]) - {location[-1]}
        return f"unknown key '{where}'" + nearest(location[-1], valid)
    if problem["type"] == "missing":
        return f"'{where}' is missing and has no default"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, Mapping | list) or value is None else f" (got {value!r})"
    return f"{where}: {message}{shown}"


def _location(data: Any, problem: Mapping[str, Any]) -> list[str]:
    """Return the path as the user wrote it, without the members of unions that pydantic adds."""
    found: list[str] = []
    for part in problem["loc"]:
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
            found.append(str(part))
    return [*found, str(problem["loc"][-1])] if problem["type"] == "missing" else found


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of a message about a wrong name: the nearest valid name, or a list of all valid ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid are {', '.join(names)}" if names else ""


def _keys_at(cls: type[Section], location: Sequence[str]) -> set[str]:
    """Return the keys that the sections at a location accept."""
    candidates: list[Any] = [cls]
    for part in location:
        candidates = [inner for candidate in candidates for inner in _inner(candidate, part)]
    return {
        name for candidate in candidates for section in _sections(candidate) for name in section.model_fields
    }


def _inner(annotation: Any, part: str) -> list[Any]:
    found: list[Any] = []
    for section in _sections(annotation):
        if part in section.model_fields:
            found.append(section.model_fields[part].annotation)
    for option in _options(annotation):
        if typing.get_origin(option) in (dict, Mapping):
            found.append(typing.get_args(option)[1])
        elif typing.get_origin(option) in (list, tuple):
            found.append(typing.get_args(option)[0])
    return found


def _options(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for inner in typing.get_args(annotation) for option in _options(inner)]
    return [annotation]


def _sections(annotation: Any) -> list[type[Section]]:
    return [o for o in _options(annotation) if isinstance(o, type) and issubclass(o, Section)]


def content_hash(section: Section) -> str:
    """Return a hash of the content of a section (12 hex digits).

    Folders and tracked runs are found again by this hash, so it must stay what earlier versions computed. A
    field that was added later is marked with the version that added it,
    `Field(default=…, json_schema_extra={SINCE: "0.2"})`, and is hashed only if it differs from its default. A
    default that was replaced by one with equal results is hashed as it was: `json_schema_extra={FORMER: 1}`.
    """
    text = json.dumps(_hashed(section, section.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hashed(value: Any, dumped: Any) -> Any:
    """Remove the fields that were added later and hold their defaults from a dump, at any depth."""
    if isinstance(value, Section):
        found = {}
        for name, field in type(value).model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if getattr(value, name) != field.get_default(call_default_factory=True):
                found[name] = _hashed(getattr(value, name), dumped[name])
            elif SINCE not in extra:
                found[name] = extra.get(FORMER, _hashed(getattr(value, name), dumped[name]))
        return found
    if isinstance(value, Mapping):
        return {key: _hashed(inner, dumped[str(key)]) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hashed(inner, other) for inner, other in zip(value, dumped, strict=True)]
    return dumped


def leaves(section: Section) -> dict[str, str]:
    """Flatten a section to dotted key → text, the form of tracked parameters."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in flatten(section.model_dump(mode="json")).items()
    }


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to dotted key → value; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": below for inner, below in flatten(value).items()}
        else:
            found[str(key)] = value
    return found


# `rayft.config(…)` is a function of the Python API.
make_callable(__name__)
