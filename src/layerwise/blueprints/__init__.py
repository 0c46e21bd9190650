"""Architectures that are built and trained from scratch rather than obtained, one technique a file."""
