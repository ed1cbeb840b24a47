"""How good a model is: its loss, its answers to a task, and whether two differ."""
