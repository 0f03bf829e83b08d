"""Other libraries' pipelines as sources of time. Loaded only once the library itself is."""
