"""Tests that share one server."""
