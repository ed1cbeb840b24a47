from tests.unit.tracking.fixtures import migrated, no_outside, server, spec

__all__ = ["migrated", "no_outside", "server", "spec"]
