"""`rayft sweep`: search, score, squeeze, register, report and analyse."""
