"""Methods by name: those of `rayft.methods`, and PEFT's as `peft:<Class>`."""

from __future__ import annotations

from collections.abc import Sequence

from rayft.config import nearest
from rayft.errors import MethodError
from rayft.methods import METHODS
from rayft.methods.base import Method, MethodConfig
from rayft.peft.method import PREFIX, peft_method

__all__ = ["check_free", "check_settings", "method", "settled"]


def method(name: str) -> Method:
    """Return a method by its name: a key of `METHODS`, or `peft:<Class>`.

    Raises:
        MethodError: if there is no such method, with the nearest name.
    """
    if name.startswith(PREFIX):
        return peft_method(name)
    if name not in METHODS:
        raise MethodError(f"unknown method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]


def settled(config: MethodConfig) -> MethodConfig:
    """Check the settings and fill in those that follow from the method: its one spelling, a chain's links.

    Raises:
        MethodError: if there is no such method, or a setting would do nothing.
    """
    check_settings(config)
    return method(config.name).settled(config)


def check_settings(config: MethodConfig) -> None:
    """Refuse settings that would do nothing with the method.

    Raises:
        MethodError: naming the setting, and the methods that use it where those are few.
    """
    kind, plain = method(config.name), MethodConfig(name=config.name)
    for setting, reason in kind.ignored().items():
        if getattr(config, setting) == getattr(plain, setting):
            continue
        # A setting that none of `METHODS` uses is one of PEFT's.
        users = [name for name, other in METHODS.items() if setting not in other.ignored()]
        users = users or [f"{PREFIX}<Class>"]
        instead = f", or use {_listed(users, 'or')}" if 2 * len(users) < len(METHODS) else ""
        raise MethodError(f"'{kind.name}' {reason}, so method.{setting} does nothing: drop it{instead}")
    kind.check_settings(config)


def check_free(name: str, setting: str, way_out: str) -> None:
    """Refuse a setting that needs factors which can take any values and any rank.

    Args:
        name: of the method.
        setting: what needs such factors.
        way_out: a sentence that says what to do.

    Raises:
        MethodError: with the methods that have such factors, the reason, and the way out.
    """
    kind = method(name)
    reason = kind.fixed_factors()
    if reason is not None:
        free = _listed([name for name, other in METHODS.items() if other.fixed_factors() is None], "and")
        raise MethodError(f"{setting} is for {free}, not for '{kind.name}': {reason}. {way_out}")


def _listed(names: Sequence[str], last: str) -> str:
    *most, final = names
    return f"{', '.join(most)} {last} {final}" if most else final
