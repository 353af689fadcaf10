"""Samples, prompt sources, tokenizers and chat templates, packing, TrainBatch."""
