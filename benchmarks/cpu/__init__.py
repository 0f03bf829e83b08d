"""Parts of the CPU benchmark (`benchmarks/cpu_attention.py`)."""
