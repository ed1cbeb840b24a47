from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.serving.config import ServeConfig
from rayft.serving.keys import KeyConfig, UnauthorizedError, identify, resolved

SECRET, OTHER = "s3cret-of-the-admin", "s3cret-of-somebody"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_keys_are_found_and_become_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", SECRET)
    (tmp_path / "key").write_text(OTHER + "\n")
    keys = resolved(
        [
            KeyConfig(name="ops", role="admin", env="THE_KEY"),
            KeyConfig(name="ann", file=str(tmp_path / "key"), adapters=("a",)),
        ]
    )
    assert [key.sha256 for key in keys] == [sha(SECRET), sha(OTHER)]
    assert SECRET not in repr(keys)
    admin, user = (identify(keys, f"Bearer {text}") for text in (SECRET, OTHER))
    assert (admin.name, admin.admin, admin.may_ask("b"), admin.may_ask("base")) == ("ops", True, True, True)
    assert (user.name, user.admin, user.may_ask("a"), user.may_ask("b")) == ("ann", False, True, False)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRET}", SECRET])
def test_without_a_known_key_nobody_is_let_in(header: str | None) -> None:
    keys = [KeyConfig(name="ops", role="admin", sha256=sha(SECRET)), KeyConfig(name="b", sha256=sha(OTHER))]
    with pytest.raises(UnauthorizedError):
        identify(keys, header)


def test_without_keys_anyone_may() -> None:
    assert identify([], None).admin


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ({"name": "a"}, "one of env, file and sha256"),
        ({"name": "a", "env": "A", "file": "b"}, "one of env, file and sha256"),
        ({"name": "a", "sha256": "abc"}, "64 hex digits"),
        ({"name": "a", "role": "admin", "env": "A", "adapters": ["b"]}, "drop adapters"),
        ({"name": "a", "key": "plain"}, "key"),
    ],
)
def test_wrong_keys_are_named(key: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse(ServeConfig, {"keys": [key]})


def test_keys_that_are_not_there_stop_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setenv("ONE", SECRET)
    for keys, word in (
        ([{"name": "a", "env": "NO_SUCH_KEY"}], "the environment has no NO_SUCH_KEY"),
        ([{"name": "a", "file": str(tmp_path / "none")}], "No such file"),
        ([{"name": "a", "env": "SHORT"}], "fewer than 16"),
        ([{"name": "a", "env": "ONE"}, {"name": "b", "env": "ONE"}], "two keys are the same"),
    ):
        with pytest.raises(ConfigError, match=word):
            resolved([parse(KeyConfig, key) for key in keys])


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(ConfigError, match="callers need keys"):
        parse(ServeConfig, {"host": "192.0.2.1"})
    for host in ("127.0.0.1", "localhost"):
        assert parse(ServeConfig, {"host": host}).host == host
    assert parse(ServeConfig, {"host": "192.0.2.1", "keys": [{"name": "a", "env": "A"}]}).keys
