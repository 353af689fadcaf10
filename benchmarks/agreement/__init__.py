"""What `benchmarks/alignment.py` is made of."""
