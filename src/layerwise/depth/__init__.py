"""Techniques that change which blocks run."""
