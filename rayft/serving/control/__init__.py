"""What is served, and how it changes: the director, its sources and copies, and what may be served at all."""
