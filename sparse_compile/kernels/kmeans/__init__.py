"""Deterministic batched k-means."""
