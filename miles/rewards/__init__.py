"""Verifiers, reward models, and the user hook."""
