"""Text renderers of what is known of a run: plain functions from values to lines."""
