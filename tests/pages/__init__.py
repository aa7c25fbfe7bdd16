"""Tests of the page of a run: what is in it, and what a browser makes of it."""
