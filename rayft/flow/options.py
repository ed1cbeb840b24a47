"""Refuse options that would change nothing: who gives one expects something of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayft.errors import ConfigError

__all__ = ["check_overrides", "refuse_unused"]

UNREAD = {
    "sweep": {
        "method": "sweep.methods",
        "anneal": "sweep.methods.METHOD.anneal",
        "optim.lr": "sweep.methods.METHOD.lr",
    },
    "train": dict.fromkeys(("question", "squeeze", "analyze", "promote", "serve"), "`rayft sweep`"),
}
"""Command → section or setting that it does not read → what to use instead."""


def refuse_unused(options: Mapping[str, object], why: str) -> None:
    """Refuse options that have no effect.

    Args:
        options: option, as a user writes it → its value. One that is None or False was not given.
        why: why they have no effect, as the end of a sentence.

    Raises:
        ConfigError: if one was given.
    """
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise ConfigError(f"{' and '.join(given)} would change nothing, because {why}; leave {them} out")


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Refuse `--set` of what a command does not read.

    Raises:
        ConfigError: naming the setting, and what is read instead.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        for unread, instead in UNREAD[command].items():
            if not f"{key}.".startswith(f"{unread}."):
                continue
            raise ConfigError(
                f"--set {key} would change nothing, because `rayft {command}` does not read it; use {instead}"
            )
