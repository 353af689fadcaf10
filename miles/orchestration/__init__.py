"""Executors, the loop, weight sync, supervision."""
