"""The fine-tuning methods, one file each; the dictionary below is their registry."""

from __future__ import annotations

from rayft.config import nearest
from rayft.errors import MethodError
from rayft.methods import asym, c3la, cla, cola, full, lora, lora_plus, paca, rac, rc3la, rcla
from rayft.methods.base import ChainConfig, Method, MethodConfig
from rayft.methods.rival import PREFIX, rival

__all__ = ["METHODS", "method", "settled"]

MODULES = (full, lora, lora_plus, asym, cola, rac, paca, cla, rcla, c3la, rc3la)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}


def method(name: str) -> Method:
    """Look a method up: a key of `METHODS`, or `peft:<Class>`.

    Raises:
        MethodError: if there is none of that name, with the nearest one.
    """
    if name.startswith(PREFIX):
        return rival(name)
    if name not in METHODS:
        raise MethodError(f"unknown method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]


def settled(config: MethodConfig) -> MethodConfig:
    """Fill in what follows from the method: its one spelling, and a chain's usual links where none are given.

    Raises:
        MethodError: if there is no such method, or a setting would do nothing.
    """
    kind = method(config.name)
    kind.check_settings(config)
    if kind.chained and config.chain is None:
        return config.model_copy(update={"chain": ChainConfig()})
    if config.name != kind.name:
        return config.model_copy(update={"name": kind.name})
    return config
