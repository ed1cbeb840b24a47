"""Packaged configurations: `ray submit` copies only a script, so defaults travel with the package."""
