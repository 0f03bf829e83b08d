"""What the demo and the benchmarks measure with."""
