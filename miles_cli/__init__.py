"""The terminal of miles."""
