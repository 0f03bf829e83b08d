"""The command `sparse-attn`."""
