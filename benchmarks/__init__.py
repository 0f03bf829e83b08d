"""Programs that measure. Run from the root of the repository; each file says how."""
