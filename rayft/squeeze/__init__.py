"""LoRA-Squeeze: bring trained adapters to lower ranks. Maths on tensors and artifacts, no training.

`rayft.squeeze(…)` calls the function in `rayft.api`.
"""

from rayft.callable_package import make_callable

make_callable(__name__)
