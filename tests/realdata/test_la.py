"""The 28 real LA volumes through the LA source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cfrbench.datasets import check_source, find_duplicates
from cfrbench_data.la import SHIPPED, LeftAtrium

pytestmark = pytest.mark.realdata


@pytest.fixture
def source(data_folder: Path) -> LeftAtrium:
    """LA on the real folder."""
    return LeftAtrium(root=data_folder / "la")


def test_split_is_the_beginning_of_the_fields(source: LeftAtrium) -> None:
    split = source.split()
    train, test = ((SHIPPED / f"la_{role}.txt").read_text().split() for role in ("train", "test"))
    assert split.train == tuple(train[:20])
    assert split.test == tuple(test[:8])
    # Its own lists name exactly what is there, and that is less than the field's.
    assert split.note == "20 of 80 training and 8 of 20 test cases present"


def test_shipped_split_on_a_partial_set_says_so(source: LeftAtrium, tmp_path: Path) -> None:
    assert source.root is not None
    for folder in source.root.iterdir():
        if folder.is_dir():
            (tmp_path / folder.name).symlink_to(folder)
    partial = LeftAtrium(root=tmp_path).split()
    assert (partial.train, partial.test) == (source.split().train, source.split().test)
    assert partial.note == "20 of 80 training and 8 of 20 test cases present"


def test_every_volume_is_what_the_field_describes(source: LeftAtrium) -> None:
    split = source.split()
    for case in (*split.train, *split.test):
        volume = source.load(case)
        assert volume.image.dtype == torch.float32
        assert volume.label is not None
        assert 130 <= volume.shape[0] <= 250
        assert 120 <= volume.shape[1] <= 170
        assert volume.shape[2] == 88
        assert set(torch.unique(volume.label).tolist()) == {0, 1}
        assert 0.1 < float(volume.image.mean()) < 2  # z-scored before the crop, so not around 0


def test_nothing_to_complain_about(source: LeftAtrium) -> None:
    assert len(source.fingerprint()) == 28
    assert find_duplicates(source.fingerprint()) == []
    assert [finding.level for finding in check_source(source)] == ["note"]  # that the set is partial
