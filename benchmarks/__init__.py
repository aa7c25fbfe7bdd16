"""Measured speed: each file compares a fast path with the plain or official way in one process."""
