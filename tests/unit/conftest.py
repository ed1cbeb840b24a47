"""What the tests of units share: how hypothesis runs."""

from __future__ import annotations

from hypothesis import settings

# On a busy machine an example takes any time.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
