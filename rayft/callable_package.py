"""Packages that can be called: `rayft.sweep(…)` runs a sweep, and `rayft.sweep.space` is a module.

A function and a package of the same name can't both be `rayft.sweep`: importing any module of the package
would replace the function. Here the package itself is callable, in whatever order things are imported. Python
allows a module another class for such purposes ("Customizing module attribute access" in its reference).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["make_callable"]


class CallablePackage(ModuleType):
    """A package or module that calls the function of its name in `rayft.api`.

    That is imported at the first call.
    """

    @property
    def __wrapped__(self) -> Any:
        """The function, whose signature `inspect` and editors show."""
        return getattr(importlib.import_module("rayft.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        return self.__wrapped__(*args, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        # cloudpickle knows modules by their exact class.
        return importlib.import_module, (self.__name__,)


def make_callable(name: str) -> None:
    """Make a package or module callable; its own code calls this.

    Args:
        name: its `__name__`.
    """
    sys.modules[name].__class__ = CallablePackage
