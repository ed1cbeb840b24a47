"""The right Ray cluster is found, and one that does not answer is reported within seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ray import _raylet

from rayft.flow import address
from rayft.flow.address import find_address, unreachable
from tests.unit.flow.ray_head import closed, head_node, silent, web_server


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(address, "SECONDS_TO_ANSWER", 1.0)


def left_behind(tmp_path: Path, text: str) -> None:
    """Write what `ray start` does."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("named", "current", "found"),
    [
        (None, None, ("", False)),
        ("", None, ("", False)),
        ("local", "10.0.0.1:6379", ("", False)),
        (None, "10.0.0.1:6379\n", ("10.0.0.1:6379", False)),
        ("auto", "10.0.0.1:6379", ("10.0.0.1:6379", True)),
        ("auto", None, ("auto", True)),
        ("10.0.0.2:6379", "10.0.0.1:6379", ("10.0.0.2:6379", True)),
    ],
)
def test_the_variable_has_precedence_over_the_file_of_ray_start(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    named: str | None,
    current: str | None,
    found: tuple[str, bool],
) -> None:
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    if current is not None:
        left_behind(tmp_path, current)
    assert find_address() == found


def test_a_file_of_ray_start_that_is_not_text_is_ignored(tmp_path: Path) -> None:
    left_behind(tmp_path, "")
    (tmp_path / "ray" / "ray_current_cluster").write_bytes(b"\xff\xfe")
    assert find_address() == ("", False)


@pytest.mark.parametrize(
    ("listens", "problem"),
    [
        (silent, "no answer within 1 seconds"),
        (closed, "no Ray head node answers there .*refused"),
        (web_server, "no Ray head node answers there"),
    ],
)
def test_a_server_that_is_not_a_cluster_is_reported(
    listens: Callable[[], AbstractContextManager[str]], problem: str
) -> None:
    with listens() as place:
        assert re.match(problem, unreachable(place))


def test_an_unknown_host_is_reported() -> None:
    assert "no Ray head node answers there" in unreachable("rayft-is-nowhere.invalid:6379")


def test_a_head_node_that_answers_is_no_problem() -> None:
    with head_node() as place:
        assert unreachable(place) == ""


def test_a_token_that_the_cluster_refuses_is_reported() -> None:
    with head_node(token="another") as place:
        assert "RAY_AUTH_TOKEN" in unreachable(place)


@pytest.fixture
def own_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set a token for this user, without deciding whether it is used."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    _raylet.AuthenticationTokenLoader.instance().reset_cache()
    _raylet.Config.initialize("")
    yield "0" * 64
    monkeypatch.undo()
    _raylet.AuthenticationTokenLoader.instance().reset_cache()
    _raylet.Config.initialize("")


def test_the_users_token_is_sent_to_a_cluster_on_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_token: str
) -> None:
    with head_node(token=own_token) as place:
        monkeypatch.setenv("RAY_ADDRESS", place)
        assert "RAY_AUTH_MODE=token" in unreachable(find_address()[0])
        monkeypatch.delenv("RAY_ADDRESS")
        left_behind(tmp_path, place)
        assert unreachable(find_address()[0]) == ""


@pytest.mark.parametrize(
    "named",
    [
        "nonsense",
        "host:port",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:99999",
        "::1:6379",
        " 10.0.0.1:6379",
        "a b:1",
    ],
)
def test_a_malformed_address_is_reported(named: str) -> None:
    assert "write host:port" in unreachable(named)


@pytest.mark.parametrize("named", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_the_address_of_another_service_is_reported(named: str) -> None:
    assert "ray job submit" in unreachable(named)
