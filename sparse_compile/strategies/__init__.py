"""Planners: each turns a site into the ops of one sparse-attention method."""
