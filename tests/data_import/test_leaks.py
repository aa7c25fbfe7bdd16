"""No image trains under one name and is tested under another: the run stops, and names both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cfrbench
from cfrbench.errors import DataError
from cfrbench.prepared import copies
from cfrbench.prepared.importing import ImportRequest, import_folder
from cfrbench.prepared.leaks import SIGNATURES
from tests.data_import.sound_files import H5, h5_folder, nifti_folder, volume, write_h5

TURNS = [(order, flips) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
         for flips in np.ndindex(2, 2, 2)]  # fmt: skip


def turned(image: Any, order: tuple[int, ...], flips: tuple[int, ...]) -> Any:
    return np.flip(image, [axis for axis, chosen in enumerate(flips) if chosen]).transpose(order)


@pytest.mark.parametrize(("order", "flips"), TURNS)
def test_a_copy_is_known_however_its_axes_lie(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    first, second = volume(0)[0], volume(1)[0]
    rows = [copies.signature(image) for image in (second, first, turned(first, order, flips))]
    assert [pair[:2] for pair in copies.find_copies(rows)] == [(1, 2)]


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 1000), st.floats(-1e4, 1e4), st.integers(0, 50))
def test_a_copy_is_known_whatever_its_scale(factor: float, offset: float, seed: int) -> None:
    image = volume(seed)[0].astype(np.float64)
    rows = [copies.signature(image), copies.signature(image * factor + offset), copies.signature(volume(seed + 1)[0])]
    assert [pair[:2] for pair in copies.find_copies(rows)] == [(0, 1)]


def test_many_images_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [copies.signature(volume(number)[0]) for number in range(9)]
    rows += [rows[4], copies.signature(np.ones((16, 16, 16))), copies.signature(np.ones((8, 8, 8)))]
    whole = copies.find_copies(rows)
    monkeypatch.setattr(copies, "_ROWS", 4)
    assert copies.find_copies(rows) == whole
    assert [pair[:2] for pair in whole] == [(4, 9)]  # constant images are copies of none


# ---------------------------------------------------------------------------------------------------------------------
# a run


def planned(root: Path, store: Path) -> Any:
    return cfrbench.sweep.plan(cfrbench.RunConfig(dataset="la", data_root=root, preset="smoke"), store)


def leaked(home: Path, change: Any) -> Path:
    """LA's layout, in which the test case c is the training case a, changed."""
    root = h5_folder(home / "la")
    with h5py.File(root / H5.format("a")) as file:
        image, label = file["image"][()], file["label"][()]
    write_h5(root / H5.format("c"), image=change(image), label=change(label))
    return root


@pytest.mark.parametrize(
    "change",
    [lambda v: v, lambda v: v[:, ::-1], lambda v: np.rot90(v, axes=(0, 2))],
    ids=["renamed", "flipped", "turned"],
)
def test_a_run_is_stopped_by_a_test_image_that_trains(tmp_path: Path, change: Any) -> None:
    with pytest.raises(DataError) as told:
        cfrbench.run(dataset="la", data_root=leaked(tmp_path, change), preset="smoke", store=tmp_path / "store")
    said = str(told.value)
    assert "a = c" in said or ("a (train list)" in said and "c (test list)" in said)
    assert not (tmp_path / "store/train").exists()


def test_one_case_in_both_lists_stops_a_run(tmp_path: Path) -> None:
    root = h5_folder(tmp_path / "la")
    (root / "test.list").write_text("c\nb\n")
    with pytest.raises(DataError, match="b stand in the train list and in the test list"):
        planned(root, tmp_path / "store")


def test_copies_in_one_list_are_no_leak(tmp_path: Path) -> None:
    root = h5_folder(tmp_path / "la")
    with h5py.File(root / H5.format("a")) as file:
        write_h5(root / H5.format("b"), image=file["image"][()][::-1], label=file["label"][()][::-1])
    assert planned(root, tmp_path / "store").chains


def test_a_set_whose_lists_were_edited_stops_a_run(tmp_path: Path) -> None:
    """Imports look for copies themselves; what was put together by hand is found before it runs."""
    folder, store = nifti_folder(tmp_path / "data"), tmp_path / "store"
    done = import_folder(ImportRequest(folder, "mine", store)).prepared
    rows = np.load(done.folder / "signatures.npy")
    rows[list(done.record.cases).index(done.record.test[0])] = rows[0]
    np.save(done.folder / "signatures.npy", rows)
    with pytest.raises(DataError) as told:
        cfrbench.run(dataset="mine", preset="smoke", store=store)
    assert f"{done.record.test[0]} (test list)" in str(told.value)
    assert f"{next(iter(done.record.cases))} (train list)" in str(told.value)


def test_images_are_read_once_and_their_signatures_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, store, heard = h5_folder(tmp_path / "la"), tmp_path / "store", []
    config = cfrbench.RunConfig(dataset="la", data_root=root, preset="smoke")
    cfrbench.sweep.plan(config, store, lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert len(list((store / SIGNATURES).iterdir())) == 3
    monkeypatch.setattr(copies, "signature", None)  # whoever reads an image again fails
    cfrbench.sweep.plan(config, store, lambda done, total: heard.append((done, total)))
    assert len(heard) == 3


def test_a_store_that_takes_nothing_does_not_hinder_a_plan(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(DataError, match=r"a \(train list\) and c \(test list\)"):
        planned(leaked(tmp_path, lambda v: v[::-1]), tmp_path / "store")


def test_phantoms_are_drawn_from_seeds_and_not_compared(tmp_path: Path) -> None:
    cfrbench.sweep.plan(cfrbench.RunConfig(preset="smoke"), tmp_path)
    assert not (tmp_path / SIGNATURES).exists()
