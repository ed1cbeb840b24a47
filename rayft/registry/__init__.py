"""The registry of adapters: names, versions, aliases, and the gate that a promotion must pass."""

from rayft.registry.promote import Gate, Promotion, promote
from rayft.registry.ref import AdapterRef, AdapterVersion, Registry

__all__ = ["AdapterRef", "AdapterVersion", "Gate", "Promotion", "Registry", "promote"]
