"""Parallelisms, driven by a model family's row; the work is torchtitan's own functions."""
