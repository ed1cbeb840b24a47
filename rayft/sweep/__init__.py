"""Searching over methods, ranks, learning rates and seeds.

`rayft.sweep(…)` calls the function in `rayft.api`.
"""

from rayft.callable_package import make_callable

make_callable(__name__)
