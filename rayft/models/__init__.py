"""Base models: loading them, choosing their linear layers, putting adapters in."""
