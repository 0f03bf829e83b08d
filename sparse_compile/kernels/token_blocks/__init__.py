"""Blocks of neighbouring tokens, none of which mixes text and video."""
