"""`rayft squeeze`: bring an adapter or a sweep's winners to lower ranks."""
