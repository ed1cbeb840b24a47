"""`rayft config`: the settings in force, each with the place that it comes from, and their JSON Schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayft.config import config_text, flatten, overridden, parse, read_yaml
from rayft.flow.address import default_folder
from rayft.flow.config import TrainConfig, config_file, package_names, packaged
from rayft.tracking.base import redacted, tracker_spec

__all__ = ["DEFAULT", "Setting", "schema", "settings"]

DEFAULT = "default"
"""Source of a value that nobody has set."""
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
    """`default`, the file, `--set`, or an environment variable; empty above a section."""


def settings(name: str | Path, overrides: Sequence[str] = ()) -> list[Setting]:
    """Return the configuration in force, line by line: together they are YAML that means the same.

    Args:
        name: a file, or the name of a packaged configuration. It may lack a `sweep`.
        overrides: settings such as `sweep.trials=4`.

    Raises:
        ConfigError: if there is no such file, or anything in it is wrong.
    """
    path = config_file(name)
    given = read_yaml(config_text(path, base=package_names()), str(path))
    config = parse(TrainConfig, given, overrides)
    known = packaged()
    source = f"{path.name} of rayft" if str(name) in known else str(path)
    # A later source is preferred to an earlier one.
    places = [(flatten(overridden({}, overrides)), "--set"), (flatten(given), source)]
    values = config.model_dump(mode="json")
    # Two defaults depend on the environment.
    output = default_folder(config.name) if config.output is None else config.folder
    implied = {}
    if config.output is None:
        values["output"] = str(output)
        implied["output"] = "RAYFT_OUTPUT"
    if config.tracking.uri is None:
        values["tracking"]["uri"] = tracker_spec(config.tracking, output).uri
        implied["tracking.uri"] = "MLFLOW_TRACKING_URI"
    values["tracking"]["uri"] = redacted(values["tracking"]["uri"])

    def source_of(key: str) -> str:
        for keys, place in places:
            if key not in implied and any(f"{key}.".startswith(f"{each}.") for each in keys):
                return place
        variable = implied.get(key, "")
        return variable if os.environ.get(variable) else DEFAULT

    found = [Setting(text, source_of(key) if key else "") for text, key in _lines(values)]
    there = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if os.environ.get(name)]
    return [*found, *(Setting(f"# {line}", "environment") for line in there)]


def _lines(values: Mapping[str, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the lines of nested mappings as YAML, each with its dotted key; a section's own line has none."""
    for key, value in values.items():
        name = f"{'  ' * depth}{_yaml(key)}:"
        if isinstance(value, Mapping) and value:
            yield name, ""
            yield from _lines(value, f"{above}{key}.", depth + 1)
        else:
            yield f"{name} {_yaml(value)}", f"{above}{key}"


def _yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    # YAML's own style for a text with line breaks takes several lines.
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a configuration of `rayft sweep` and `rayft train`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TrainConfig.model_json_schema(),
        "title": "Configuration of rayft",
    }
