"""Variants of a small run, reporters that end a run, and torch as it was before a run under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch.nn import functional

from rayft.config import Section
from rayft.data.template import Encoded
from rayft.methods import METHODS
from rayft.methods.base import Chain, ChainConfig, MethodConfig
from rayft.train.packed import Courses, Pack
from rayft.train.run import RunConfig
from rayft.train.session import Session
from tests.reporter import RecordingReporter

CHAINS = sorted(name for name, method in METHODS.items() if isinstance(method, Chain))
ADAPTERS = sorted(name for name, method in METHODS.items() if method.exports_lora)


FAMILIES = ("lora_plus", "rc3la", "paca", "full")
"""Methods that the default suite tries where all methods behave alike: factors, a chain of selectors, one
that changes the base, and the base itself."""


def by_family(names: Iterable[str], first: Iterable[str] = FAMILIES) -> list[Any]:
    """Return the methods for a test: those of `first` always, the others only with `-m exhaustive`."""
    chosen = set(first)
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def changed(run: RunConfig, **sections: object) -> RunConfig:
    """Return a run with other settings; settings that do not fit together raise, as in a configuration."""
    update: dict[str, object] = dict(sections)
    for name, values in sections.items():
        known = getattr(run, name)
        if isinstance(known, Section) and isinstance(values, Mapping):
            update[name] = known.model_copy(update=dict(values))
    return RunConfig(**{**{name: getattr(run, name) for name in RunConfig.model_fields}, **update})


def with_method(run: RunConfig, name: str, *, links: int = 3, **sections: object) -> RunConfig:
    """Return a run of another method at rank 4; a chain has three links, and `full` a lower learning rate."""
    chain = ChainConfig(links=links) if isinstance(METHODS[name], Chain) else None
    run = changed(run, method=MethodConfig(name=name, rank=4, chain=chain), **sections)
    return changed(run, optim={"lr": 1e-3}) if name == "full" else run


@contextmanager
def restored_linear() -> Iterator[None]:
    """Restore `torch.nn.functional.linear` after the block.

    DeepSpeed replaces it for the rest of the process when ZeRO-3 partitions the first parameter, and a lane
    needs the replacement as long as its base is partitioned. It keeps other tensors for the backward pass.
    """
    linear = functional.linear
    try:
        yield
    finally:
        functional.linear = linear


def two_rows(run: RunConfig, session: Session) -> tuple[RunConfig, Session]:
    """Return a run and a session of which each epoch has two rows, of 9 and of 16 tokens."""
    texts = [Encoded((5,) * length, (5,) * length) for length in (9, 16)]
    return changed(run, data={"max_length": 16}), replace(session, train=texts, row_streams={})


class StopAt(RecordingReporter):
    """Stop a run at the evaluation after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep the numbers, and return False at the step."""
        super().report(step, metrics)
        return step != self._step


class DieAt(RecordingReporter):
    """Raise after an evaluation, like a killed process: nothing after it is done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Keep the numbers, and raise at the step."""
        super().report(step, metrics)
        if step == self._step:
            raise KeyboardInterrupt
        return True


def play(courses: Courses[Any], pack: Pack, late: str = "") -> None:
    """Take the steps of the runs of a pack until all have ended; whoever asks may go on.

    Args:
        courses: of the runs.
        pack: theirs.
        late: run whose first question is answered only when the others have taken two more steps.
    """
    waited = 0
    while len(courses):
        for key in courses.questions:
            if key != late or waited == 2:
                courses.answer(key, True)
        waited += late in courses.questions
        courses.advance()
    pack.close()
