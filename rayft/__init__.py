"""rayft: search fine-tuning methods and ranks, compress the winners, serve many of them at once.

The functions of this package do what the commands of the same names do. They are documented in `rayft.api`,
which is imported when one of them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayft.api import (
        Adapter,
        Conversation,
        Evaluation,
        Exported,
        Piece,
        Run,
        Settings,
        Squeezed,
        Sweep,
        chat,
        config,
        evaluate,
        export,
        init,
        load,
        schema,
        squeeze,
        sweep,
        train,
    )

__all__ = [
    "Adapter",
    "Conversation",
    "Evaluation",
    "Exported",
    "Piece",
    "Run",
    "Settings",
    "Squeezed",
    "Sweep",
    "__version__",
    "chat",
    "config",
    "evaluate",
    "export",
    "init",
    "load",
    "schema",
    "squeeze",
    "sweep",
    "train",
]

__version__ = "0.2.0.dev0"

PACKAGES = ("config", "evaluate", "squeeze", "sweep", "train")
"""Functions that are packages or modules too (`rayft.callable_package`)."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in PACKAGES:
        return import_module(f"rayft.{name}")
    if name in __all__:
        return getattr(import_module("rayft.api"), name)
    raise AttributeError(f"module 'rayft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
