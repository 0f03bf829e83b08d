"""Means, sizes and coupling of the key groups: what stands for a group that a row skips."""
