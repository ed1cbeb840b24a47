"""How the functions of the Python API behave in the program that calls them.

They check the types of their arguments, and leave the process as they found it. A command need not: its
process ends with it.
"""

from __future__ import annotations

import inspect
import numbers
import re
import signal
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rayft.environment import restore, values_of
from rayft.errors import ConfigError
from rayft.flow.address import own
from rayft.flow.cluster import VARIABLES as OF_RAY
from rayft.flow.cluster import stop_cluster
from rayft.flow.quiet import known_lines_hidden
from rayft.tracking.connection import VARIABLES as OF_MLFLOW

__all__ = ["alone", "checked", "left_as_found"]

VARIABLES = (*OF_RAY, *OF_MLFLOW)
"""Environment variables that are set for Ray, MLflow and the processes that are started."""
LONGEST = 80
"""Most characters of a wrong argument that are shown."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function raise a ConfigError for an argument that is not of the annotated type."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        for name, value in signature.bind(*args, **options).arguments.items():
            if name in (hints := _hints(function)):
                _check(name, value, hints[name])
        return function(*args, **options)

    return call


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _check(name: str, value: Any, hint: Any) -> None:
    try:
        _validator(hint).validate_python(_plain(value))
    except ValidationError as error:
        kind = re.sub(r"\b(?:\w+\.)+", "", hint.__name__ if isinstance(hint, type) else str(hint))
        text = repr(value)
        shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
        raise ConfigError(f"{name} must be {kind}, not {shown}") from error


@cache
def _validator(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _plain(value: Any) -> Any:
    """Replace sequences by lists and NumPy's numbers by Python's, which strict validation asks for."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(one) for one in value]
    if isinstance(value, int | float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


@contextmanager
def left_as_found() -> Iterator[None]:
    """Leave the process as it was, after a block or a function that this decorates.

    Loggers, environment variables, the handler of SIGTERM and the connection to Ray are then what they were.
    Tensors are made on the CPU meanwhile, whatever the program's default device is.
    """
    with ExitStack() as stack:
        stack.enter_context(known_lines_hidden())
        stack.enter_context(_process.kept())
        stack.enter_context(_handler_kept())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Run a block, or a function that this decorates, in one thread at a time; others wait.

    It is for functions that start Ray, which a process can do once: the thread that ends first would end the
    cluster of the others.
    """
    with _using_ray:
        yield


_using_ray = threading.RLock()


@contextmanager
def _handler_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces in the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Python knows no handler that C code has installed.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Process:
    """What the threads share that run functions at the same time: the last one to end restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._variables: dict[str, str | None] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the environment variables, and leave a cluster that was joined, after a block."""
        with self._lock:
            if not self._running:
                self._variables = values_of(VARIABLES)
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._restore()

    def _restore(self) -> None:
        if own.joined:
            # The stages that need a cluster end one that was started, and stay in one that was joined.
            stop_cluster()
        restore(self._variables)


_process = _Process()
