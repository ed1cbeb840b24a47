"""Serve one base model and many adapters behind OpenAI's HTTP interface, on Ray Serve."""
