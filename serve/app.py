"""The application that `serve run serve/config.yaml` and `serve deploy serve/config.yaml` start."""

from __future__ import annotations

from typing import Any

import ray.serve as ray_serve

from rayft.config import parse
from rayft.serving.build import build_app
from rayft.serving.config import ServeConfig


def app(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from the `args` of `serve/config.yaml`."""
    return build_app(parse(ServeConfig, args))
