from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from rayft.config import parse
from rayft.errors import ConfigError
from rayft.serving.config import ServeConfig
from rayft.serving.http.auth import (
    Caller,
    ForbiddenError,
    Guard,
    KeyConfig,
    UnauthorizedError,
    identify,
    resolved,
)

SECRET, OTHER = "s3cret-of-the-admin", "s3cret-of-somebody"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_resolved_keys_are_hashes_and_identify_their_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_request_without_a_known_key_is_refused(header: str | None) -> None:
    keys = [KeyConfig(name="ops", role="admin", sha256=sha(SECRET)), KeyConfig(name="b", sha256=sha(OTHER))]
    with pytest.raises(UnauthorizedError):
        identify(keys, header)


def test_anyone_may_call_a_server_without_keys() -> None:
    assert identify([], None).admin


def test_pages_of_other_sites_can_not_use_a_server_without_keys() -> None:
    def ask(*keys: KeyConfig, **headers: str) -> Caller:
        fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        app = SimpleNamespace(state=SimpleNamespace(keys=keys))
        return asyncio.run(Guard()(Request({"type": "http", "app": app, "headers": fields})))

    with pytest.raises(ForbiddenError, match="has no keys"):
        ask(sec_fetch_site="cross-site")
    for site in ("same-origin", "same-site", "none"):
        assert ask(sec_fetch_site=site).admin
    key = KeyConfig(name="ann", sha256=sha(SECRET))
    assert ask(key, sec_fetch_site="cross-site", authorization=f"Bearer {SECRET}").name == "ann"


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ({"name": "a"}, "one of env, file and sha256"),
        ({"name": "a", "env": "A", "file": "b"}, "one of env, file and sha256"),
        ({"name": "a", "sha256": "abc"}, "64 hex digits"),
        ({"name": "a", "role": "admin", "env": "A", "adapters": ["b"]}, "remove its `adapters`"),
        ({"name": "a", "key": "plain"}, "key"),
    ],
)
def test_a_wrong_key_configuration_is_an_error(key: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse(ServeConfig, {"keys": [key]})


def test_a_key_that_can_not_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setenv("UMLAUT", "Schlüssel-zum-Dienst")
    monkeypatch.setenv("ONE", SECRET)
    for keys, word in (
        ([{"name": "a", "env": "NO_SUCH_KEY"}], "the environment variable NO_SUCH_KEY is not set"),
        ([{"name": "a", "file": str(tmp_path / "none")}], "No such file"),
        ([{"name": "a", "env": "SHORT"}], "fewer than 16"),
        ([{"name": "a", "env": "UMLAUT"}], "characters other than ASCII"),
        ([{"name": "a", "env": "ONE"}, {"name": "b", "env": "ONE"}], "two keys are equal"),
    ):
        with pytest.raises(ConfigError, match=word):
            resolved([parse(KeyConfig, key) for key in keys])


def test_an_address_that_other_machines_reach_needs_keys() -> None:
    with pytest.raises(ConfigError, match="callers need keys"):
        parse(ServeConfig, {"host": "192.0.2.1"})
    for host in ("127.0.0.1", "localhost"):
        assert parse(ServeConfig, {"host": host}).host == host
    assert parse(ServeConfig, {"host": "192.0.2.1", "keys": [{"name": "a", "env": "A"}]}).keys
