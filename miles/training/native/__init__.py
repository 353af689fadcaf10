"""The torch trainer: one process, packed sequences, replayed routes, fused AdamW."""
