"""Tests of executors on clusters, of faults, and of size."""
