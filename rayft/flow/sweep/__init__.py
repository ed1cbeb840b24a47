"""`rayft sweep`: search, score, squeeze, register and report."""
