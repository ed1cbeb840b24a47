from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.one_server.server import Server, start


@pytest.fixture(scope="package")
def one_server(
    local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server of all modules in this folder."""
    with start(tiny_folder, tmp_path_factory.mktemp("one-server")) as started:
        yield started


@pytest.fixture(scope="module")
def restored(one_server: Server) -> Iterator[Server]:
    """The server; when a module ends, it serves again what it served before."""
    yield one_server
    one_server.restore()
