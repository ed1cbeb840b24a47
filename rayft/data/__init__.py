"""Data: read a source (reasoning-gym, hub, files) into three parts, encode them, and pack them into rows."""
