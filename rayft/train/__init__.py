"""One training run: its configuration, its DeepSpeed engine, its loop.

`rayft.train(…)` calls the function in `rayft.api`.
"""

from rayft.callable_package import make_callable

make_callable(__name__)
