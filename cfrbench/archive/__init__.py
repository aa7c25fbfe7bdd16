"""A finished run as one file that a colleague can check: written from a store, read with distrust, recomputed."""
