"""Draw a reasoning-gym task as three parts that share no question.

Item i of a data set with seed s is drawn from s + i, so the items of two seeds overlap. Each part therefore
takes its own range of indices of one seed, and questions that occurred before are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from rayft.config import nearest
from rayft.data.example import Example, Message, shown
from rayft.data.split import Dropped
from rayft.errors import DataError, ResourceError

__all__ = ["build_task", "draw_parts"]

Params = Mapping[str, int | float | str | bool]

DRAWS = 4
"""Most items drawn for each item wanted: enough to find 98% of a space of equally likely questions."""

_GLOBAL = threading.Lock()
"""Held by the thread that has seeded the global generators."""


def draw_parts(
    name: str, params: Params, sizes: Mapping[str, int], seed: int, separator: str
) -> tuple[dict[str, list[Example]], tuple[Dropped, ...]]:
    """Draw `sizes[part]` different questions for each part.

    Parts are drawn in the order of `sizes`, each from the index where the one before it stopped.

    Args:
        name: the task.
        params: its options.
        sizes: part → number of examples.
        seed: of the task.
        separator: the `separator` of the examples.

    Returns:
        The examples of each part, and what was skipped because the question had occurred before.

    Raises:
        DataError: if the task is unknown, its params are wrong, or it has too few questions.
        ResourceError: if reasoning-gym is not installed.
    """
    wanted = sum(sizes.values())
    limit = DRAWS * wanted + 100
    task = build_task(name, params, seed, limit)
    seen: set[str] = set()
    parts: dict[str, list[Example]] = {}
    again: list[Example] = []
    index = 0
    with _global_random(seed):
        for part, size in sizes.items():
            parts[part] = []
            while len(parts[part]) < size:
                if index == limit:
                    raise _too_small(name, sizes, len(seen), limit)
                example = _item(task, name, index, separator)
                index += 1
                if example.key in seen:
                    again.append(example)
                else:
                    seen.add(example.key)
                    parts[part].append(example)
    return parts, _passed_over(name, again, index)


def _passed_over(name: str, again: Sequence[Example], drawn: int) -> tuple[Dropped, ...]:
    if not again:
        return ()
    text = (
        f"reasoning-gym's {name}: {len(again)} of {drawn} drawn items repeated a question, since the task "
        f"has few different ones; other items replaced them (the first is {shown(again[0])})"
    )
    return (Dropped(len(again), text),)


def build_task(name: str, params: Params, seed: int, size: int) -> Any:
    """Return reasoning-gym's data set of a task.

    Raises:
        DataError: if there is no such task or option, or an option has a wrong value.
        ResourceError: if reasoning-gym is not installed.
    """
    try:
        # Waits for another thread that imports it; the table alone may be half filled then.
        import reasoning_gym
    except ImportError as error:
        raise ResourceError(
            "source: reasoning_gym needs the package reasoning-gym: run `pip install 'rayft[demo]'`"
        ) from error
    tasks = reasoning_gym.factory.DATASETS
    if name not in tasks:
        raise DataError(f"reasoning-gym has no task '{name}'{nearest(name, tasks)}")
    make, config = tasks[name]
    options = _options(name, config, params)
    try:
        # The tasks check their options with assert, and may raise any other error too.
        return make(config=config(**options, seed=seed, size=size))
    except Exception as error:
        raise DataError(f"the task '{name}' refuses data.params {dict(params)}: {error}") from error


def _options(name: str, config: type, params: Params) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    valid = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
    options = {}
    for key, value in params.items():
        if key not in valid:
            raise DataError(f"the task '{name}' has no option '{key}'{nearest(key, valid)} (data.params)")
        try:
            options[key] = TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise DataError(f"data.params.{key} of the task '{name}': {problem} (got {value!r})") from error
    return options


def _item(task: Any, name: str, index: int, separator: str) -> Example:
    entry = task[index]
    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(
            f"item {index} of the task '{name}' has no reference answer, only a scorer, so there is nothing "
            "to learn from; choose another task"
        )
    turns = Message("user", entry["question"]), Message("assistant", answer)
    return Example(messages=turns, separator=separator, entry=entry)


def _too_small(name: str, sizes: Mapping[str, int], found: int, drawn: int) -> DataError:
    wanted = " + ".join(f"{size} {part}" for part, size in sizes.items())
    return DataError(
        f"the task '{name}' can't fill its parts ({wanted} = {sum(sizes.values())}): {drawn} items hold only "
        f"{found} different questions; ask for less, or widen the task with data.params"
    )


@contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """Seed the global generators for a block, since some tasks draw from them, and restore them after it."""
    with _GLOBAL:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
