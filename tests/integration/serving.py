"""Starts servers for tests, and makes adapters for them."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.serving.build import APPLICATION, run
from rayft.serving.config import ServeConfig
from rayft.serving.http.app import create_app
from rayft.serving.http.auth import KeyConfig
from rayft.squeeze.rank import squeeze
from tests.unit.serving.adapters import random_adapter

_KEY = "the-key-of-the-admin"
HEADERS = {"Authorization": f"Bearer {_KEY}"}
"""Headers with an admin's key."""
ADMIN = KeyConfig(name="ops", role="admin", sha256=hashlib.sha256(_KEY.encode()).hexdigest())


@dataclass(frozen=True)
class Base:
    """The tiny model, and the folder of adapters for it."""

    model: Path
    root: Path
    shapes: dict[str, tuple[int, int]]
    fingerprint: str

    @classmethod
    def read(cls, model: Path, root: Path) -> Base:
        loaded = load_model(ModelConfig(name=str(model)), torch.float32)
        return cls(model, root, dict(linear_shapes(loaded.model)), loaded.fingerprint)

    def adapter(self, name: str, rank: int = 4, *, selector: bool = False) -> AdapterArtifact:
        return random_adapter(name, self.shapes, self.fingerprint, rank, selector)

    def squeezed(self, name: str, rank: int = 4) -> AdapterArtifact:
        """Return an adapter that can be served at lower ranks."""
        return squeeze(self.adapter(name, rank))

    def save(self, name: str, artifact: AdapterArtifact) -> str:
        return str(artifact.save(self.root / name))


def configured(base: Base, port: int, **settings: Any) -> ServeConfig:
    """Return the configuration of a server of the tiny model in float32."""
    model, fetched = ModelConfig(name=str(base.model)), str(base.root / "fetched")
    return ServeConfig(**{"model": model, "port": port, "fetched": fetched, "dtype": "float32", **settings})


@contextmanager
def serving(base: Base, *, roots: Sequence[str] = (), **settings: Any) -> Iterator[str]:
    """Serve the tiny model in float32, and yield the server's URL.

    Args:
        base: the model, and the folder that adapters may be loaded from.
        roots: further places that adapters may be loaded from.
        settings: of `ServeConfig`.
    """
    import ray.serve as ray_serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    run(configured(base, port, roots=(str(base.root), *roots), **settings), blocking=False)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()


def description() -> dict[str, Any]:
    """Return the OpenAPI document that every server publishes."""
    unused: Any = None
    return create_app(unused).openapi()


def replica_stats() -> list[dict[str, Any]]:
    """Return the counts of every replica."""
    import ray.serve as ray_serve

    handle: Any = ray_serve.get_deployment_handle("Replica", APPLICATION)
    return list(handle.broadcast("stats").results())
