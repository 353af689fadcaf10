"""The native decoder and its blocks, routing, and log-probs: one implementation for both sides."""
