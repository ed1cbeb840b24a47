"""Ray Serve's settings of the application, for `rayft serve` and in files for `serve deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["APPLICATION", "deployment"]

APPLICATION = "rayft"
"""Name of the application in Ray Serve."""


def deployment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a server that `serve deploy` reads.

    Args:
        settings: fields of `ServeConfig`.
    """
    return {
        # The ingress listens itself.
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": None,
                "import_path": "rayft.serving.build:app",
                "args": dict(settings),
            }
        ],
    }
