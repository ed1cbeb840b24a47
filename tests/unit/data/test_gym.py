"""Tasks of reasoning-gym: parts share no question, and wrong tasks are errors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest

from rayft.config import parse
from rayft.data import gym
from rayft.data.source import DataConfig, read
from rayft.errors import DataError
from tests.unit.data.small_data import keys, task


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("needle_haystack", {"min_num_statements": 3, "max_num_statements": 5}),
        ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
        ("number_format", {"max_num_candidates": 3}),
    ],
)
def test_parts_of_a_task_share_no_question_and_no_index(name, params):
    parts = read(task(name, params, (80, 20, 20)))
    found = keys(parts)
    assert [len(part) for part in found] == [80, 20, 20]
    assert len(set.union(*found)) == 120
    ranges = [
        {example.entry["metadata"]["source_index"] for example in part}
        for part in (parts.test, parts.val, parts.train)
    ]
    assert max(ranges[0]) < min(ranges[1]) <= max(ranges[1]) < min(ranges[2])


def test_repeated_questions_are_skipped_and_counted():
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    parts = read(task("chain_sum", params, (40, 10, 10)))
    assert parts.digest == "b60b1f4b13b9bdbc", "which the first version gave"
    (again,) = parts.dropped
    last = max(example.entry["metadata"]["source_index"] for example in parts.train)
    assert again.rows == last + 1 - 60
    assert again.text.startswith(
        f"reasoning-gym's chain_sum: {again.rows} of {last + 1} drawn items repeated a question, since the "
        "task has few different ones; other items replaced them (the first is '"
    )
    assert read(task("needle_haystack")).dropped == ()


def test_a_task_that_is_too_small_says_how_many_questions_it_has():
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(
        DataError, match=r"'chain_sum' can't fill its parts .* = 420\): \d+ items hold only \d+ diff"
    ):
        read(task("chain_sum", small, (400, 10, 10)))


def test_reading_twice_returns_equal_parts_that_can_be_pickled():
    first, second = read(task("needle_haystack")), read(task("needle_haystack"))
    assert first == second
    assert first.digest == second.digest
    assert len(first.digest) == 16
    assert pickle.loads(pickle.dumps(first)) == first  # noqa: S301  (its own bytes)
    other = read(parse(DataConfig, {**task("needle_haystack").model_dump(exclude={"files"}), "seed": 1}))
    assert other.digest != first.digest


def test_a_larger_train_part_does_not_change_val_and_test():
    few, many = read(task("needle_haystack")), read(task("needle_haystack", sizes=(60, 10, 10)))
    assert (few.test, few.val) == (many.test, many.val)


def test_reading_does_not_change_the_global_generators():
    import random

    import numpy as np

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    read(task("needle_haystack"))
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


PACKAGE = """
import dataclasses, time
from reasoning_gym import factory

@dataclasses.dataclass
class Config:
    seed: int
    size: int

time.sleep(1)
factory.DATASETS["mine"] = (lambda config: "made"), Config
"""
"""Fills its table after other threads can see it, as the package itself does."""
THREADS = """
import time
from concurrent.futures import ThreadPoolExecutor

from rayft.data.gym import build_task

with ThreadPoolExecutor(2) as pool:
    tasks = []
    for _ in range(2):
        tasks.append(pool.submit(build_task, "mine", {}, 0, 1))
        time.sleep(0.3)
    print(*[task.result() for task in tasks])
"""


def test_two_threads_can_import_the_tasks(tmp_path):
    folder = tmp_path / "reasoning_gym"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "factory.py").write_text("DATASETS = {}\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["made", "made"], done.stderr


@pytest.mark.parametrize(
    ("name", "params", "match"),
    [
        ("needle_haystak", {}, "no task 'needle_haystak'; did you mean 'needle_haystack'"),
        ("chain_sum", {"min_term": 2}, "no option 'min_term'; did you mean 'min_terms'"),
        (
            "chain_sum",
            {"min_terms": "two"},
            r"data.params.min_terms of the task 'chain_sum': .*integer \(got 'two'\)",
        ),
        ("chain_sum", {"min_terms": 0}, "'chain_sum' refuses data.params"),
        ("chain_sum", {"seed": 3}, "no option 'seed'"),
        ("rubiks_cube", {}, "has no reference answer"),
    ],
)
def test_a_wrong_task_is_an_error_that_names_the_problem(name, params, match):
    with pytest.raises(DataError, match=match):
        read(task(name, params))


def test_items_are_drawn_up_to_the_documented_multiple(monkeypatch):
    drawn = []

    class Constant:
        def __getitem__(self, index: int) -> dict[str, str]:
            drawn.append(index)
            return {"question": "always", "answer": "the same"}

    monkeypatch.setattr(gym, "build_task", lambda *_: Constant())
    with pytest.raises(DataError, match="108 items hold only 1 different questions"):
        gym.draw_parts("constant", {}, {"test": 1, "train": 1}, 0, "\n")
    assert drawn == list(range(108))
