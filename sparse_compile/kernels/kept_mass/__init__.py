"""The attention mass that a Plan keeps, measured on a few probe rows."""
