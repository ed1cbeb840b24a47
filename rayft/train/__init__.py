"""One training run: its configuration, its DeepSpeed engine, its loop."""
