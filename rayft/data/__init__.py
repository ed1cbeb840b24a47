"""From a source (reasoning-gym, hub, file) to three parts, token rows and a schedule of batches."""
