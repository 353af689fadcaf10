"""Trainers: log-probs, losses, optimizer steps, checkpoints. `trainer.py` is what all of them obey."""
