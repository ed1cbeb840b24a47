"""The fine-tuning methods, one file each; the dictionary below is their registry."""

from __future__ import annotations

from rayft.config import nearest
from rayft.errors import MethodError
from rayft.methods import cla, full, lora
from rayft.methods.base import Method

__all__ = ["METHODS", "method"]

METHODS: dict[str, Method] = {m.METHOD.name: m.METHOD for m in (full, lora, cla)}


def method(name: str) -> Method:
    """Look a method up.

    Raises:
        MethodError: if there is none of that name, with the nearest one.
    """
    if name not in METHODS:
        raise MethodError(f"unknown method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]
