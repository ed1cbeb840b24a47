"""`rayft analyze`: measure what adapters have learnt. A sweep analyses its trials by the same functions."""
