"""Adapters by name: versions, aliases, and the gate before an alias moves."""

from rayft.registry.promote import Gate, Promotion, promote
from rayft.registry.ref import AdapterRef, AdapterVersion, Registry

__all__ = ["AdapterRef", "AdapterVersion", "Gate", "Promotion", "Registry", "promote"]
