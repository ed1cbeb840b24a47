"""`rayft squeeze`: bring adapters to lower ranks. A sweep squeezes its best trials by the same functions."""
