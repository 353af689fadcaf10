"""What `engine.py` measures: models, workloads, the sides, the machine's roofline, and the table."""
