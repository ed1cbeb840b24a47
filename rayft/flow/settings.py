"""`rayft config`: the settings in force, each with the place that it comes from, and their JSON Schema."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from rayft.config import flatten, overridden, parse, yaml_line
from rayft.flow.address import default_folder
from rayft.flow.config import TrainConfig, config_file, config_values, packaged
from rayft.tracking.base import redacted, tracker_spec

__all__ = ["DEFAULT", "GIVEN", "Setting", "Settings", "schema", "settings"]

DEFAULT = "default"
"""Source of a value that nobody has set."""
GIVEN = "given"
"""Source of a value of a configuration that comes from no file."""
WIDTH = 56
"""Column of the comments, if the values leave room for it."""
ENVIRONMENT = (
    "RAYFT_CACHE", "RAY_ADDRESS", "RAY_TMPDIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME",
    "HF_HUB_OFFLINE",
)  # fmt: skip
"""Environment variables that decide where and how a command runs, besides those that replace a default."""


@dataclass(frozen=True)
class Setting:
    """A line of the configuration in force, as YAML."""

    text: str
    """`key: value`, or `key:` above a section, indented by its depth."""
    source: str = ""
    """`default`, the file, `given`, `--set`, or an environment variable; empty above a section."""


@dataclass(frozen=True)
class Settings:
    """A configuration as it is in force: every setting, those with defaults too."""

    values: Mapping[str, Any]
    """The settings, as nested mappings of plain values. A password in `tracking.uri` is replaced by `***`."""
    sources: Mapping[str, str]
    """Dotted key of a value, such as `optim.lr` → where it comes from: `default`, the file, `given` (for a
    configuration from no file), `--set`, or an environment variable."""
    environment: Mapping[str, str]
    """Environment variables that are set, and decide where and how a command runs."""
    lines: tuple[Setting, ...] = field(repr=False)
    """The same as lines of YAML that means the same, as `rayft config` prints them."""

    def __str__(self) -> str:
        """Return the YAML, with the source of each value as a comment."""
        return "\n".join(self.commented())

    def commented(self) -> list[str]:
        """Return the lines, each with its source as a comment."""
        width = min(WIDTH, max(len(line.text) for line in self.lines))
        return [f"{line.text:<{width}}  # {line.source}" if line.source else line.text for line in self.lines]


def settings(
    config: str | PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Sequence[str] = ()
) -> Settings:
    """Return the configuration in force.

    Args:
        config: a file, the name of a packaged configuration, its content, or an object. It may lack a
            `sweep`.
        overrides: settings such as `sweep.trials=4`.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    given, source = _read(config)
    found = parse(TrainConfig, given, overrides)
    # A later source is preferred to an earlier one.
    places = [(flatten(overridden({}, overrides)), "--set"), (flatten(given), source)]
    values = found.model_dump(mode="json")
    # Two defaults depend on the environment.
    output = default_folder(found.name) if found.output is None else found.folder
    implied = {}
    if found.output is None:
        values["output"] = str(output)
        implied["output"] = "RAYFT_OUTPUT"
    if found.tracking.uri is None:
        values["tracking"]["uri"] = tracker_spec(found.tracking, output).uri
        implied["tracking.uri"] = "MLFLOW_TRACKING_URI"
    values["tracking"]["uri"] = redacted(values["tracking"]["uri"])

    def source_of(key: str) -> str:
        for keys, place in places:
            if key not in implied and any(f"{key}.".startswith(f"{each}.") for each in keys):
                return place
        variable = implied.get(key, "")
        return variable if os.environ.get(variable) else DEFAULT

    sources = {key: source_of(key) for key in flatten(values)}
    lines = [Setting(text, sources[key] if key else "") for text, key in _lines(values)]
    there = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    # Empty, it hides every GPU; the others are then as if they were not set.
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        there["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    lines += [Setting(f"# {name}={value}", "environment") for name, value in there.items()]
    return Settings(values, sources, there, tuple(lines))


def _read(config: str | PathLike[str] | Mapping[str, Any] | TrainConfig) -> tuple[Mapping[str, Any], str]:
    """Return what a user has set, and the name of its source."""
    if isinstance(config, TrainConfig):
        return config.model_dump(mode="json", exclude_unset=True), GIVEN
    if isinstance(config, Mapping):
        return config, GIVEN
    name = os.fspath(config)
    path = config_file(name)
    source = f"{path.name} of rayft" if name in packaged() else str(path)
    return config_values(path), source


def _lines(values: Mapping[str, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the lines of nested mappings as YAML, each with its dotted key; a section's own line has none."""
    for key, value in values.items():
        name = f"{'  ' * depth}{yaml_line(key)}:"
        if isinstance(value, Mapping) and value:
            yield name, ""
            yield from _lines(value, f"{above}{key}.", depth + 1)
        else:
            yield f"{name} {yaml_line(value)}", f"{above}{key}"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration of `rayft sweep` and `rayft train`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TrainConfig.model_json_schema(),
        "title": "Configuration of rayft",
    }
