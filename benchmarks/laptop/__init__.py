"""The two sides of `laptop_grpo.py`, each run in a process of its own, and what is made of their numbers."""
