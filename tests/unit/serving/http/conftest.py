from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from rayft.serving.http.app import create_app
from rayft.serving.http.auth import KeyConfig
from tests.unit.serving.http.recording import ADMIN, USER, RecordingGateway


@pytest.fixture(scope="session")
def gateway() -> RecordingGateway:
    return RecordingGateway()


@pytest.fixture(scope="session")
def client(gateway: RecordingGateway) -> Iterator[TestClient]:
    """A client of the application, without Ray Serve; anyone may call it."""
    with TestClient(create_app(gateway)) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture
def guarded(gateway: RecordingGateway) -> Iterator[TestClient]:
    """The application with a user's and an admin's key, and bodies of up to 100 bytes."""
    keys = [
        KeyConfig(name=role, role=role, sha256=hashlib.sha256(key.encode()).hexdigest())  # type: ignore[arg-type]
        for role, key in (("admin", ADMIN), ("user", USER))
    ]
    with TestClient(create_app(gateway, keys, ("/adapters",), 100)) as made:  # type: ignore[arg-type]
        yield made
