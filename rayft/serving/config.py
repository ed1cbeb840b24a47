"""What `rayft serve` and `serve/config.yaml` can set."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from rayft.config import Section
from rayft.models.load import ModelConfig

__all__ = ["BASE_NAME", "ServeConfig"]

BASE_NAME = "base"
"""The `model` of a request that wants no adapter (the base's own name does as well)."""


class ServeConfig(Section):
    """One base model, the adapters on it, and the resources they may use."""

    model: ModelConfig = ModelConfig()
    """The base."""

    adapters: dict[str, str] = {}
    """Name in the `model` field → adapter folder, which every replica must be able to read."""

    host: str = "127.0.0.1"
    """Address to listen on (`serve deploy` takes it from `http_options` of its own file)."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on (as `host`)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and arithmetic; auto: bfloat16 on a GPU, the faster one on a CPU (measured)."""

    engine: Literal["auto", "packed", "transformers"] = "auto"
    """What generates: transformers' continuous batching over a paged cache, or rayft's own for CPUs (packed);
    auto: packed on a CPU, transformers on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a replica runs; auto: a GPU if the Ray cluster has one."""

    replicas: int = Field(default=1, ge=1)
    """Copies of base and adapters; requests are spread over them."""

    cpus: int = Field(default=1, ge=1)
    """CPU cores for each replica, which are also its threads."""

    max_running: int = Field(default=32, ge=1)
    """Requests in one batch of a replica; more wait for a place."""

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
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"'{name}' can't be an adapter's name: use letters, digits, '.', '_' and '-' "
                    "('@' is for ranks, as in name@r8)"
                )
        return adapters
