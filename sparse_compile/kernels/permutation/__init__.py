"""Stable counting sort of labels."""
