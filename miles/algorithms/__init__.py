"""Pure tensor functions: reward normalisation, advantages, policy losses, KL, corrections, reductions.

Nothing here knows a trainer, a model or a run file. Rows of several sequences lie flat, one after the other;
`Sequences` says where each begins. Both trainers call the same functions.
"""
