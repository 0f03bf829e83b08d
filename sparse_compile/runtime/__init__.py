"""What lives between calls: the clock, the layers and their state, the report."""
