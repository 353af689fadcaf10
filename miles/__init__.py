"""miles: reinforcement-learning post-training for large language models, Mixture-of-Experts first."""

from miles._version import __version__

__all__ = ["__version__"]
