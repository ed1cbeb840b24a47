"""Ray Serve's settings of the application, for `rayft serve` and in files for `serve deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["APPLICATION", "PROXY_ENVIRONMENT", "deployment"]

APPLICATION = "rayft"
"""Name of the application in Ray Serve."""

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayft.serving.proxy:middlewares"}
"""Environment variables for Ray Serve's controller, which the proxies inherit."""


def deployment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a server that `serve deploy` reads.

    Args:
        settings: fields of `ServeConfig`, `host` and `port` among them.
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
