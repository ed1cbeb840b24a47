"""How good a model is: its loss, its answers to a task, and whether two differ.

`rayft.evaluate(…)` calls the function in `rayft.api`.
"""

from rayft.callable_package import make_callable

make_callable(__name__)
