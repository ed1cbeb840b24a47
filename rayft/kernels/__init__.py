"""Products that are worth a kernel of their own; each has a plain reference beside it."""
