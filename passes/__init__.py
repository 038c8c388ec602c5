"""The graph passes: analyses and rewrites, in the order of ``pipeline.py``."""
