"""The settings of `rayft serve` and of the `args` in `serve/config.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayft.config import SINCE, Section
from rayft.models.load import ModelConfig
from rayft.paths import PathText
from rayft.serving.http.auth import KeyConfig
from rayft.serving.messages import check_name
from rayft.squeeze.section import Size

__all__ = ["ServeConfig"]

LOCAL = ("127.0.0.1", "::1", "localhost")


class ServeConfig(Section):
    """One base model, the adapters on it, and the resources they may use."""

    model: ModelConfig = ModelConfig()
    """The base model."""

    adapters: dict[str, PathText] = {}
    """Name in the `model` field → place of the adapter: a folder, `models:/name@alias` (followed when the
    alias moves), `models:/name/3`, or a URL that fsspec reads (`s3://bucket/adapters/one`)."""

    pinned: tuple[str, ...] = ()
    """Names of adapters that always stay on the device."""

    registry: PathText | None = None
    """URI of MLflow, for `models:/…`."""

    follow_seconds: float = Field(default=5.0, gt=0)
    """Interval at which `models:/name@alias` is looked up again."""

    roots: tuple[PathText, ...] = ()
    """Folders and URL prefixes below which adapters may be loaded over HTTP; none by default."""

    fetched: PathText = "runs/serving/adapters"
    """Folder for adapters fetched from registries and URLs, and for the server's own copies of the adapters
    that it serves. The nodes of a cluster need not share it: replicas on other nodes than the head receive
    the copies, and keep them in this folder of their own node."""

    max_adapter_bytes: Size = "2GB"
    """Size of the largest adapter that is loaded."""

    max_body_bytes: Size = "16MB"
    """Size of the largest body that a request may have; a larger one is answered 413."""

    device_bytes: Size | None = None
    """Limit on the memory of adapters on the device (on a CPU: in memory); beyond it the least recently used
    adapter is evicted. None: no limit on a CPU, 2 GB on a GPU, where the memory is taken at the start."""

    host_bytes: Size | None = None
    """Limit on the memory of adapters that are kept in host memory: on a GPU all of them, on a CPU those that
    `device_bytes` had no room for when they were loaded. Adapters beyond it are read from disk again when
    they are needed. None is no limit."""

    keys: tuple[KeyConfig, ...] = ()
    """The callers' keys. Without keys anyone may call, so `host` must be an address of this machine alone."""

    host: str = "127.0.0.1"
    """Address to listen on, of the cluster's head."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and arithmetic; auto: bfloat16 on a GPU, and on a CPU the one that is measured to be
    faster."""

    engine: Literal["auto", "vllm", "cpu"] = "auto"
    """The engine: vLLM, on GPUs, or rayft's own, on CPUs; auto: vLLM if the Ray cluster has a GPU."""

    gpus: int = Field(default=1, ge=1, json_schema_extra={SINCE: "0.2"})
    """Number of GPUs of each replica, which share the base (tensor parallelism of vLLM)."""

    gpu_memory: float = Field(default=0.9, gt=0, le=1, json_schema_extra={SINCE: "0.2"})
    """Share of each GPU's memory that vLLM takes for the base, adapters and the KV cache."""

    fp8: bool = Field(default=False, json_schema_extra={SINCE: "0.2"})
    """Whether vLLM quantises the base's linear layers to fp8 when it loads them."""

    vllm_untested: bool = Field(default=False, json_schema_extra={SINCE: "0.2"})
    """Whether to serve with a release of vLLM that was not tried on a GPU."""

    replicas: int = Field(default=1, ge=1)
    """Number of replicas, each with the base and the adapters. A request goes to a replica that has its
    adapter on the device, unless that one is too busy."""

    max_replicas: int | None = Field(default=None, ge=1)
    """If set, the number of replicas follows the traffic, from `replicas` up to this number."""

    cpus: int = Field(default=1, ge=1)
    """Number of CPU cores, and of threads, of each replica."""

    max_running: int = Field(default=32, ge=1)
    """Largest number of requests in one batch of a replica; further ones wait for a place."""

    max_queued: int = Field(default=256, ge=1)
    """Largest number of requests that wait in addition to those that the replicas hold (five times
    `max_running` each); further ones are answered 429 at once."""

    max_seconds: float = Field(default=600.0, gt=0)
    """Time limit of a request in a replica, including the wait for a place; then it ends with an error."""

    wait_seconds: float = Field(default=1.0, ge=0, json_schema_extra={SINCE: "0.2"})
    """Time that a request waits while no replica is up (the last one was lost, and another one is starting or
    can't start); then it is answered 503 with the reason."""

    drain_seconds: float = Field(default=30.0, gt=0)
    """Time that a server or replica that is being stopped has to finish its running requests."""

    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Largest number of tokens in one forward; longer prompts are processed in parts, between the steps of
    other requests. None: 512 on a CPU, what vLLM chooses on a GPU."""

    cache_tokens: int | None = Field(default=None, ge=64)
    """Size of a replica's KV cache for all its running requests, in tokens. None: 8192 on a CPU, what the
    memory holds on a GPU."""

    max_new_tokens: int = Field(default=1024, ge=1)
    """Largest number of tokens that one request may generate."""

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            check_name(name)
        return adapters

    @model_validator(mode="after")
    def _known_names(self) -> ServeConfig:
        unknown = [name for name in self.pinned if name not in self.adapters]
        if unknown:
            raise ValueError(f"pinned: there is no adapter '{unknown[0]}'")
        wanted = [name for name, source in self.adapters.items() if source.startswith("models:/")]
        if wanted and self.registry is None:
            raise ValueError(f"adapter '{wanted[0]}' is in MLflow's registry; set registry to MLflow's URI")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})")
        if not self.keys and self.host not in LOCAL:
            raise ValueError(
                f"host {self.host} can be reached from other machines, so callers need keys: set keys, at "
                "least one of them with the role admin, or listen on 127.0.0.1"
            )
        return self
