"""Engines, generation functions, collection."""
