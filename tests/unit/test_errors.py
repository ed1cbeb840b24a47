"""The tree in the docstring of the module is that of the classes, and errors can be pickled."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from rayft import errors
from rayft.errors import BadRequestError, RayftError, RequestError, UnknownModelError

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, Exception) and cls.__module__ == errors.__name__
}


def drawn() -> dict[str, str]:
    """Return child → parent as the docstring has it: each is below the last class that is less indented."""
    parents: dict[str, str] = {}
    above = ["RayftError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^( +)[x+] (\w+Error)\b", line):
            depth = 1 + len(found[1]) // 4
            above = [*above[:depth], found[2]]
            parents[found[2]] = above[depth - 1]
    return parents


def test_the_drawn_tree_is_the_class_tree() -> None:
    actual = {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items() if cls is not RayftError}
    assert drawn() == actual


def test_all_errors_are_exported_and_documented() -> None:
    assert sorted(CLASSES) == sorted(errors.__all__)
    for name, cls in CLASSES.items():
        assert issubclass(cls, RayftError)
        assert cls.__doc__, f"{name} says nothing"


@pytest.mark.parametrize("cls", [c for c in CLASSES.values() if not issubclass(c, RequestError)])
def test_errors_survive_pickle(cls: type[RayftError]) -> None:
    again = pickle.loads(pickle.dumps(cls("why; what to do")))  # noqa: S301
    assert type(again) is cls
    assert str(again) == "why; what to do"


@pytest.mark.parametrize("cls", [RequestError, UnknownModelError, BadRequestError])
@pytest.mark.parametrize("param", [None, "model"])
def test_request_errors_keep_their_param_and_status(cls: type[RequestError], param: str | None) -> None:
    again = pickle.loads(pickle.dumps(cls("no such model", param=param)))  # noqa: S301
    assert type(again) is cls
    assert (str(again), again.param, again.status) == ("no such model", param, cls.status)


def test_each_request_error_has_its_status() -> None:
    assert (RequestError.status, UnknownModelError.status, BadRequestError.status) == (500, 404, 400)
    assert UnknownModelError.code == "model_not_found"
    assert BadRequestError.code == "invalid_request_error"
