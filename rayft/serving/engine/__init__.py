"""The engines that generate tokens, behind one contract (`api`)."""
