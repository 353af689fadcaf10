"""`miles init`: facts -> questions -> answers -> run file.

The core (everything but `form*.py` and `prompts.py`) holds no terminal code: the same interview serves flags,
plain prompts and the Textual form.
"""
