"""What `cfrbench data check` looks at: every case, duplicates, leakage, absent classes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cfrbench.datasets import check_source, find_duplicates, read_list, refuse_duplicates
from cfrbench.errors import DataError
from tests.data.la_files import FOLDER, case_arrays, make_root, write_h5


def test_a_sound_source_has_no_findings(tmp_path: Path) -> None:
    assert check_source(make_root(tmp_path)) == []


def test_broken_lists_are_the_only_finding(tmp_path: Path) -> None:
    (finding,) = check_source(make_root(tmp_path, train="a\nb\n", test="b\n"))
    assert finding.level == "error"
    assert "train list" in finding.message


def test_every_damaged_case_is_found_in_one_pass(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    image, label = case_arrays(5)
    write_h5(tmp_path / FOLDER / "a" / "mri_norm2.h5", image=image)
    write_h5(tmp_path / FOLDER / "c" / "mri_norm2.h5", image=image, label=label * 9)
    errors = [finding.message for finding in check_source(source) if finding.level == "error"]
    assert len(errors) == 2
    assert "'label'" in errors[0]
    assert "0..9" in errors[1]


def test_a_copy_within_a_list_is_a_duplicate(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    shutil.copy(tmp_path / FOLDER / "a" / "mri_norm2.h5", tmp_path / FOLDER / "b" / "mri_norm2.h5")
    (finding,) = check_source(source)
    assert finding.level == "error"
    assert "a = b" in finding.message
    assert "test" not in finding.message
    with pytest.raises(DataError, match="a = b"):
        refuse_duplicates(source.fingerprint())


def test_the_same_voxels_saved_again_in_the_test_list_are_leakage(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    image, label = case_arrays(0)
    write_h5(tmp_path / FOLDER / "c" / "mri_norm2.h5", image=image.astype(np.float64), label=label)
    refuse_duplicates(source.fingerprint())  # other bytes
    (finding,) = check_source(source)
    assert finding.level == "error"
    assert "a = c" in finding.message
    assert "train and test" in finding.message


def test_empty_labels_and_absent_classes_are_notes(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    for number, case in enumerate("abc"):
        image, label = case_arrays(number)
        write_h5(tmp_path / FOLDER / case / "mri_norm2.h5", image=image, label=0 * label)
    findings = check_source(source)
    assert {finding.level for finding in findings} == {"note"}
    assert sum("background everywhere" in finding.message for finding in findings) == 3
    assert "left atrium" in findings[-1].message


def test_a_partial_set_is_noted(tmp_path: Path) -> None:
    (finding,) = check_source(make_root(tmp_path, train="a\nb\nd\n"))
    assert finding.level == "note"
    assert "2 of 3 training" in finding.message


def test_find_duplicates_groups_all_names_of_one_volume() -> None:
    assert find_duplicates({"d": "1", "b": "2", "a": "1", "c": "1"}) == [("a", "c", "d")]
    assert find_duplicates({"a": "1", "b": "2"}) == []
    refuse_duplicates({"a": "1", "b": "2"})


def test_read_list_takes_several_ids_on_a_line_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.list"
    path.write_text("b, a\nBraTS19_TCIA02_370_1\n")
    assert read_list(path) == ("b", "a", "BraTS19_TCIA02_370_1")


def test_read_list_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.list cannot be read"):
        read_list(tmp_path / "none.list")
