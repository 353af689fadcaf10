"""The two sides of `trainer.py`, each run in a process of its own, and what they train on."""
