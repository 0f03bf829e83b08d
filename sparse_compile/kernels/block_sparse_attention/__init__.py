"""Exact attention over the key groups that a Plan keeps."""
