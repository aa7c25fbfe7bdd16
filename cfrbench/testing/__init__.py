"""Contract checks for authors of plug-ins: each raises AssertionError with one sentence that says what is wrong.

A guest's test is two lines: ``from cfrbench.testing import check_ssl`` and ``check_ssl(MyMethod)``.
"""

from __future__ import annotations

from cfrbench.testing.concat import check_concat
from cfrbench.testing.data import check_data, check_pseudo
from cfrbench.testing.foundation import check_model, check_tuner
from cfrbench.testing.segmenter import check_segmenter
from cfrbench.testing.ssl import check_ssl

__all__ = ["check_concat", "check_data", "check_model", "check_pseudo", "check_segmenter", "check_ssl", "check_tuner"]
