"""What the benchmarks for a GPU have in common."""
