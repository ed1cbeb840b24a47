"""What `rayft serve` and `serve/config.yaml` can set."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayft.config import SINCE, Section
from rayft.models.load import ModelConfig
from rayft.paths import PathText
from rayft.serving.http.auth import KeyConfig
from rayft.serving.messages import BASE_NAME, NAME
from rayft.squeeze.section import Size

__all__ = ["ServeConfig"]

LOCAL = ("127.0.0.1", "::1", "localhost")


class ServeConfig(Section):
    """One base model, the adapters on it, and the resources they may use."""

    model: ModelConfig = ModelConfig()
    """The base."""

    adapters: dict[str, PathText] = {}
    """Name in the `model` field → where the adapter is: a folder, `models:/name@alias` (followed when the
    alias moves), `models:/name/3`, or a URL that fsspec reads (`s3://bucket/adapters/one`)."""

    pinned: tuple[str, ...] = ()
    """Names of adapters that stay on the device."""

    registry: PathText | None = None
    """MLflow's URI, for `models:/…`."""

    follow_seconds: float = Field(default=5.0, gt=0)
    """How often `models:/name@alias` is looked up again."""

    roots: tuple[PathText, ...] = ()
    """Folders and URL prefixes below which adapters may be loaded over HTTP; none where not given."""

    fetched: PathText = "runs/serving/adapters"
    """Folder for what is fetched from registries and URLs, and for the server's own copies of the adapters
    that it serves. It need not be shared by the nodes of a cluster: replicas on other nodes than the head
    receive the copies and keep them in this folder of their own node."""

    max_adapter_bytes: Size = "2GB"
    """Largest adapter that is loaded."""

    max_body_bytes: Size = "16MB"
    """Largest body of a request; a larger one is answered 413."""

    device_bytes: Size | None = None
    """Bytes of adapters on the device (on a CPU: in memory); beyond, the least recently used moves out."""

    host_bytes: Size | None = None
    """Bytes of adapters kept in pinned host memory for a GPU; beyond, they are read from disk again."""

    keys: tuple[KeyConfig, ...] = ()
    """Who may ask; anyone where there are none, which only an address of this machine alone allows."""

    host: str = "127.0.0.1"
    """Address to listen on (`serve deploy` takes it from `http_options` of its own file)."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on (as `host`)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and arithmetic; auto: bfloat16 on a GPU, the faster one on a CPU (measured)."""

    engine: Literal["auto", "packed", "transformers"] = "auto"
    """What generates: rayft's own engine (packed) or transformers' continuous batching; auto: packed, but
    transformers' on a GPU in float32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a replica runs; auto: a GPU if the Ray cluster has one."""

    replicas: int = Field(default=1, ge=1)
    """Copies of base and adapters; a request goes to one that has its adapter on the device, if it can."""

    max_replicas: int | None = Field(default=None, ge=1)
    """With it there are as many replicas as the traffic wants, from `replicas` up to this number."""

    cpus: int = Field(default=1, ge=1)
    """CPU cores for each replica, which are also its threads."""

    max_running: int = Field(default=32, ge=1)
    """Requests in one batch of a replica; more wait for a place."""

    max_queued: int = Field(default=256, ge=1)
    """Requests that wait beyond those that the replicas have taken (five times `max_running` each); more are
    answered 429 at once."""

    max_seconds: float = Field(default=600.0, gt=0)
    """How long a request may take in a replica, waiting for a place included; then it ends with an error."""

    wait_seconds: float = Field(default=1.0, ge=0, json_schema_extra={SINCE: "0.2"})
    """How long a request waits for a replica where none is up (the last one was lost, and another one starts
    or can't start); then it is answered 503 with the reason."""

    drain_seconds: float = Field(default=30.0, gt=0)
    """How long a server that stops, or a replica that is taken away, goes on with what it has begun."""

    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens in one forward: longer prompts are read in parts, between the steps of others."""

    cache_tokens: int = Field(default=8192, ge=64)
    """Tokens of keys and values that a replica holds for all its running requests."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Most tokens that one request may ask for."""

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            if name == BASE_NAME:
                raise ValueError(f"'{BASE_NAME}' is the base itself; give the adapter another name")
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"'{name}' can't be an adapter's name: use letters, digits, '.', '_' and '-' "
                    "('@' is for ranks, as in name@r8)"
                )
        return adapters

    @model_validator(mode="after")
    def _known_names(self) -> ServeConfig:
        unknown = [name for name in self.pinned if name not in self.adapters]
        if unknown:
            raise ValueError(f"pinned: there is no adapter '{unknown[0]}'")
        wanted = [name for name, source in self.adapters.items() if source.startswith("models:/")]
        if wanted and self.registry is None:
            raise ValueError(
                f"adapter '{wanted[0]}' is in MLflow's registry: say where that is with registry"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})")
        if not self.keys and self.host not in LOCAL:
            raise ValueError(
                f"host {self.host} can be reached from elsewhere, so callers need keys: give keys, with an "
                "admin's among them, or listen on 127.0.0.1"
            )
        return self
