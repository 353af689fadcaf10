"""Runs of other systems: their metric files read into a History under our metric names."""
