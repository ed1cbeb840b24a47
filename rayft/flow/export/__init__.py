"""`rayft export`: an adapter in the forms that other programs load, and a model card about it."""
