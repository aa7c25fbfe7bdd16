"""Contract checks for authors of plug-ins: each raises AssertionError with one sentence that says what is wrong."""

from cfrbench.testing.ssl import check_ssl

__all__ = ["check_ssl"]
