"""`cfrbench data list`, `info`, `check` and `show`, for built-in, partial, imported and damaged sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cfrbench.cli import app, data  # noqa: F401 - it registers
from cfrbench.datasets import check_source
from cfrbench.errors import CfrbenchError, UsageError
from cfrbench.prepared.importing import ImportRequest, import_folder
from cfrbench.prepared.inspection import inspect, rows_of
from cfrbench.prepared.source import ImportedSource
from tests.data.la_files import FOLDER, case_arrays, make_root, write_h5
from tests.data_import.sound_files import nifti_folder, save, volume

PHANTOM = ("--set", "data.phantom.train=3", "--set", "data.phantom.test=1", "--set", "data.phantom.shape=[16,16,16]")


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A store with the set `mine`, one case of which is stored the other way round."""
    folder = nifti_folder(tmp_path / "data")
    image, label = volume(9)
    for part, voxels in (("images", image), ("labels", label)):
        save(folder / part / "case 9.nii.gz", voxels, np.diag([-1.0, 1.0, 2.0, 1.0]))
    import_folder(ImportRequest(folder, "mine", tmp_path / "store"))
    return tmp_path / "store"


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", *arguments])


def test_the_imported_are_listed_beside_the_built_in(imported: Path) -> None:
    names = [row["name"] for row in json.loads(call("list", "--json", "--store", str(imported)).stdout)]
    assert {"la", "phantom", "mine"} <= set(names)
    assert len(set(names)) == len(names)


def test_info_counts_classes_in_millilitres(imported: Path) -> None:
    facts = json.loads(call("info", "mine", "--store", str(imported), "--json").stdout)
    assert (facts["train"], facts["test"]) == (4, 1)
    assert len(facts["split"]) == 64
    cases = {case["case"]: case for case in facts["cases"]}
    assert len(cases) == 5
    voxels = np.bincount(volume(2)[1].ravel())[1:]
    assert cases["case 2"]["millilitres"] == pytest.approx(
        {f"class {n}": v * 2 / 1000 for n, v in enumerate(voxels, 1)}
    )
    text = call("info", "mine", "--store", str(imported))
    assert text.exit_code == 0
    assert "case 9" in text.stdout


def test_info_without_files_says_where_to_get_them() -> None:
    facts = json.loads(call("info", "la", "--json").stdout)
    assert "cases" not in facts
    assert facts["origin"]


def test_info_of_a_phantom_needs_no_files() -> None:
    assert len(json.loads(call("info", "phantom", "--json", *PHANTOM).stdout)["cases"]) == 4


def test_the_rows_of_a_manifest_are_those_of_its_arrays(imported: Path) -> None:
    source = ImportedSource(root=imported / "datasets/mine")
    recorded = {row.case: row for row in rows_of(source)}
    for row in inspect(source).rows:
        known = recorded[row.case]
        assert (row.role, row.shape, row.spacing_mm, row.voxels) == (
            known.role,
            known.shape,
            known.spacing_mm,
            known.voxels,
        )
        assert (row.low, row.high, row.deviation) == pytest.approx((known.low, known.high, known.deviation))


def test_check_gives_every_case_a_verdict(imported: Path) -> None:
    done = call("check", "mine", "--store", str(imported), "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["verdict"]) == (0, "ok")
    assert {case["orientation"] for case in found["cases"]} == {"RAS", "LAS"}
    assert any("2 orientations" in finding["message"] for finding in found["findings"])
    assert call("check", "mine", "--store", str(imported)).exit_code == 0


def test_a_damaged_case_is_an_error_and_the_others_are_not(tmp_path: Path) -> None:
    make_root(tmp_path)
    image, _ = case_arrays(1)
    write_h5(tmp_path / FOLDER / "b" / "mri_norm2.h5", image=image)
    done = call("check", "la", "--data-root", str(tmp_path), "--json")
    verdicts = {case["case"]: case["verdict"] for case in json.loads(done.stdout)["cases"]}
    assert done.exit_code == 1
    assert verdicts == {"a": "ok", "b": "error", "c": "ok"}
    said = call("check", "la", "--data-root", str(tmp_path))
    assert said.exit_code == 1
    assert "no array 'label'" in said.stdout


def test_intensities_far_from_the_others_and_crops_around_labels_are_notes(tmp_path: Path) -> None:
    cases = "abcde"
    source = make_root(tmp_path, train="a\nb\nc\nd\n", test="e\n")
    for number, case in enumerate(cases):
        image = np.random.default_rng(number).normal(size=(20, 20, 20)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[6:14, 6:14, 6:14] = 1
        write_h5(tmp_path / FOLDER / case / "mri_norm2.h5", image=image * (50 if case == "d" else 1), label=label)
    found = inspect(source)
    assert not found.broken
    notes = " ".join(finding.message for finding in found.findings)
    assert "Intensities of d spread" in notes
    assert "cropped around their labels" in notes
    assert {row.case: row.verdict for row in found.rows} == dict.fromkeys("abce", "ok") | {"d": "note"}


def test_labels_elsewhere_are_not_called_centred(imported: Path) -> None:
    findings = inspect(ImportedSource(root=imported / "datasets/mine")).findings
    assert not any("cropped around" in finding.message for finding in findings)


def test_an_unread_case_is_told_to_who_watches(tmp_path: Path) -> None:
    source, heard = make_root(tmp_path), []
    (tmp_path / FOLDER / "b" / "mri_norm2.h5").write_bytes(b"")
    check_source(source, lambda case, volume: heard.append((case, volume is None)))
    assert heard == [("a", False), ("b", True), ("c", False)]


def test_show_draws_the_cases_that_are_asked_for(imported: Path, tmp_path: Path) -> None:
    few, all_ = tmp_path / "few.png", tmp_path / "all.png"
    assert (
        "case 2, case 9"
        in call("show", "mine", "--store", str(imported), "--cases", "case 2,case 9", "-o", str(few)).stdout
    )
    assert call("show", "phantom", "-o", str(all_), *PHANTOM).exit_code == 0
    with Image.open(few) as picture:
        colours = {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert {(0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= colours  # a line around each of the two classes
    assert all_.stat().st_size > 1000


def test_wrong_names_are_answered_with_the_right_ones(imported: Path, tmp_path: Path) -> None:
    unknown = call("show", "mine", "--store", str(imported), "--cases", "case 22", "-o", str(tmp_path / "x.png"))
    assert isinstance(unknown.exception, UsageError)
    assert "case 2" in str(unknown.exception)
    nobody = call("check", "mien", "--store", str(imported))
    assert isinstance(nobody.exception, CfrbenchError)
    assert "mine" in str(nobody.exception)


@pytest.mark.realdata
def test_real_la_is_sound(data_folder: Path) -> None:
    done = call("check", "la", "--data-root", str(data_folder / "la"), "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, len(found["cases"])) == (0, 28)
    assert any("cropped around their labels" in finding["message"] for finding in found["findings"])
