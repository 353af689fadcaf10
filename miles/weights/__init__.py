"""Weights under published names: readers, writers, transforms, transports."""
