"""From attention mass, estimated or measured, to a keep bitmap that holds a share of it."""
