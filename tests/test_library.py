"""A process reads each volume and each stored label once, however many methods are trained and scored on it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cfrbench import prepare
from cfrbench.config import GridSection
from cfrbench.prepare import Library
from cfrbench.registry import load
from cfrbench.volume import Volume


class Counting:
    """A phantom that counts how often each case is read."""

    def __init__(self) -> None:
        cls = load("data", "phantom")
        self.inner = cls(cls.Config(shape=(16, 16, 16), train=2, test=2), None)
        self.num_classes, self.reads = self.inner.num_classes, Counter[str]()

    def load(self, case: str) -> Volume:
        self.reads[case] += 1
        volume: Volume = self.inner.load(case)
        return volume


@pytest.fixture
def source() -> Counting:
    return Counting()


def library(source: Counting) -> Library:
    return Library(source, GridSection(downsample=2))  # type: ignore[arg-type]


def test_cases_and_truths_are_read_once_and_shared(source: Counting) -> None:
    first, second = library(source), library(source)
    second.share(first)
    for held in (first, second, first):
        np.testing.assert_array_equal(held.truth("test-00").label, source.inner.load("test-00").label)
        assert held["test-00"].shape == (8, 8, 8)
    assert source.reads == {"test-00": 2}  # once for the working grid, once for the stored label


def test_labels_beyond_the_bound_are_read_again(source: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "KEPT_TRUTHS", 16**3)
    held = library(source)
    for _ in range(3):
        for case in ("test-00", "test-01"):
            held.truth(case)
    assert source.reads == {"test-00": 1, "test-01": 3}
