"""What Ray Serve is told about the application, by `rayft serve` and in files for `serve deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["APPLICATION", "PROXY_ENVIRONMENT", "deployment"]

APPLICATION = "rayft"
"""The application's name in Ray Serve."""

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayft.serving.proxy:middlewares"}
"""Environment of Ray Serve's controller, and so of the proxies that it starts."""


def deployment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `serve deploy` reads: Ray Serve's configuration of a server with these settings.

    Args:
        settings: of `ServeConfig`, with `host` and `port`.
    """
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings["host"], "port": settings["port"]},
        "controller_options": {"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "rayft.serving.build:app",
                "args": dict(settings),
            }
        ],
    }
