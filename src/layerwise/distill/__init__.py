"""Techniques that train a smaller network on what a larger one gives, one file each."""
