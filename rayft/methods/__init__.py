"""The fine-tuning methods, one file each; the dictionary below is their registry.

`rayft.models.methods` looks a method up by its name, PEFT's too.
"""

from __future__ import annotations

from rayft.methods import asym, c3la, cla, cola, full, lora, lora_plus, paca, rac, rc3la, rcla
from rayft.methods.base import Method

__all__ = ["METHODS"]

MODULES = (full, lora, lora_plus, asym, cola, rac, paca, cla, rcla, c3la, rc3la)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in MODULES}
