"""Trains the small video model that ships with the package. Not part of the wheel; run from the repository's root."""
