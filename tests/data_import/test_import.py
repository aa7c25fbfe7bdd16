"""Anybody's folder becomes a data set that trains; what is meant is taken as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

import cfrbench
from cfrbench.cli import app, data, predict  # noqa: F401 - they register
from cfrbench.errors import CfrbenchError, DataError, UsageError
from cfrbench.prepared.importing import ImportRequest, import_folder
from cfrbench.prepared.listing import list_folder
from cfrbench.prepared.reading import PreparedSet
from tests.data_import.damages import DAMAGES
from tests.data_import.sound_files import nifti_folder, save, volume

nib: Any = nibabel
SMALL = {"training.patch": (16, 16, 16), "tuning.patch": (16, 16, 16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five cases; names have a blank and a letter outside of ASCII."""
    return nifti_folder(tmp_path / "my scäns", 5)


def request(folder: Path, **fields: Any) -> ImportRequest:
    return ImportRequest(folder, fields.pop("name", "mine"), folder.parent / "store", **fields)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run(folder: Path, **fields: Any) -> cfrbench.Result:
    return cfrbench.run(dataset="mine", preset="smoke", store=folder.parent / "store", set=SMALL, **fields)


def test_a_folder_becomes_a_data_set_that_trains_and_predicts(folder: Path) -> None:
    store = str(folder.parent / "store")
    new, mask = folder.parent / "new.nii.gz", folder.parent / "mask.nii.gz"
    (folder / "images/case 4.nii.gz").rename(new)
    (folder / "labels/case 4.nii.gz").unlink()
    said = call("data", "import", str(folder), "--name", "mine", "--store", store, "--jobs", "1")
    assert said.exit_code == 0, said.output
    result = run(folder, labels=(1,))
    assert not result.failures
    assert {"baseline", "cfr"} <= {row["variant"] for row in result.as_json()["rows"]}
    assert set(result.cases["class"]) == {"class 1", "class 2"}
    done = call("predict", "latest", str(new), "-o", str(mask), "--ssl", "mt", "--variant", "cfr", "--store", store)
    assert done.exit_code == 0, done.output
    assert nib.load(mask).affine.tobytes() == nib.load(new).affine.tobytes()
    assert nib.load(mask).shape == nib.load(new).shape


def test_what_is_prepared_is_what_was_given(folder: Path) -> None:
    done = import_folder(request(folder))
    assert set(done.prepared.record.train) | set(done.prepared.record.test) == {f"case {n}" for n in range(5)}
    assert len(done.prepared.record.class_names) == 3
    opened = PreparedSet.open(done.prepared.folder)
    for number in range(5):
        image, label = volume(number)
        np.testing.assert_array_equal(opened.image(f"case {number}"), image)
        np.testing.assert_array_equal(opened.label(f"case {number}"), label)


def test_a_second_import_does_nothing_anew(folder: Path) -> None:
    first = import_folder(request(folder)).prepared.folder
    times = {path: path.stat().st_mtime_ns for path in sorted(first.rglob("*.npy")) if path.parent != first}
    assert len(times) == 10
    import_folder(request(folder))
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("what", ["an image of 0 bytes", "a 4D image", "NaN voxels", "a label of another shape"])
def test_a_damaged_case_can_be_left_out(folder: Path, what: str) -> None:
    next(damage for damage in DAMAGES if damage.what == what).spoil(folder)
    record = import_folder(request(folder, skip_bad=True)).prepared.record
    assert set(record.cases) == {"case 0", "case 1", "case 2", "case 4"}
    assert "case 3" in record.left_out


def test_the_name_of_a_built_in_is_refused(folder: Path) -> None:
    said = call("data", "import", str(folder), "--name", "la", "--store", str(folder.parent / "store"))
    assert isinstance(said.exception, UsageError)
    assert "built-in" in str(said.exception)


# ---------------------------------------------------------------------------------------------------------------------
# scans without a label, which semi-supervised learning is about


def test_scans_without_a_label_train_and_are_never_scored(folder: Path) -> None:
    for number in (0, 1):
        (folder / f"labels/case {number}.nii.gz").unlink()
    record = import_folder(request(folder)).prepared.record
    assert set(record.unlabelled) == {"case 0", "case 1"}
    result = run(folder, labels=(2,))
    assert not result.failures
    bounds = result.cases[result.cases["ssl"] == "supervised"]
    assert set(bounds["labels"]) == {2}  # the upper bound is on what has a label
    assert "pseudo-label" not in set(result.cases["variant"])  # there is no truth to hold them against
    assert set(result.cases["case"]) == set(record.test)
    with pytest.raises(DataError, match="only 2 of the 4"):
        run(folder, labels=(3,))


def test_the_labels_of_unlabelled_cases_do_not_reach_training(folder: Path) -> None:
    """The canary of an imported set: other labels for the unlabelled cases, the same networks bit for bit."""
    train = import_folder(request(folder)).prepared.record.train
    first = run(folder, labels=(1,), bounds=False)
    for case in train[1:]:
        path = folder / f"labels/{case}.nii.gz"
        save(path, np.random.default_rng(0).integers(0, 3, (16, 16, 16), dtype=np.uint8))
    import_folder(request(folder, replace=True))
    second = run(folder, labels=(1,), bounds=False)
    assert (first.failures, second.failures) == ({}, {})
    assert (first.trained, second.trained) == (9, 8)  # all but fine-tuning, which reads labelled cases alone, again
    tested = [r.cases[r.cases["variant"] != "pseudo-label"].drop(columns="split") for r in (first, second)]
    assert tested[0].equals(tested[1])
    weights = [path.read_bytes()[-1000:] for path in (folder.parent / "store/train").glob("*/weights.safetensors")]
    assert len(weights) == 4
    assert len(set(weights)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# odd, but meant


def test_labels_stored_as_scaled_floats_are_rounded(folder: Path) -> None:
    _, label = volume(1)
    scaled = nib.Nifti1Image((label / 3).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    scaled.header.set_slope_inter(3 * 0.99999, 0)
    nib.save(scaled, folder / "labels/case 1.nii.gz")
    opened = import_folder(request(folder)).prepared
    np.testing.assert_array_equal(opened.label("case 1"), label)


def test_numbers_that_do_not_follow_each_other_are_mapped_as_said(folder: Path) -> None:
    for number in range(5):
        save(folder / f"labels/case {number}.nii.gz", np.array([0, 5, 700], np.int16)[volume(number)[1]])
    opened = import_folder(request(folder, labels="700=tumour,5=organ")).prepared
    assert opened.record.class_names == ("background", "tumour", "organ")
    np.testing.assert_array_equal(opened.label("case 2"), np.array([0, 2, 1])[volume(2)[1]])


def test_a_link_that_leads_out_can_be_allowed(folder: Path) -> None:
    outside = folder.parent / "outside.nii.gz"
    (folder / "images/case 2.nii.gz").rename(outside)
    (folder / "images/case 2.nii.gz").symlink_to(outside)
    arguments = ["data", "import", str(folder), "--name", "mine", "--store", str(folder.parent / "store"), "--json"]
    assert call(*arguments, "--jobs", "1").exit_code == 1
    said = call(*arguments, "--jobs", "1", "--follow-links")
    assert said.exit_code == 0
    assert json.loads(said.stdout)["cases"] == 5


def test_a_home_folder_is_no_data_set(folder: Path) -> None:
    with pytest.raises(DataError, match="more than 8"):
        list_folder(folder, most=8)


@pytest.mark.slow
def test_a_hundred_thousand_files_get_one_paragraph(tmp_path: Path) -> None:
    home = tmp_path / "many"
    for part in ("images", "labels"):
        (home / part).mkdir(parents=True)
        for number in range(50_000):
            (home / part / f"{number}.nii.gz").touch()
    with pytest.raises(CfrbenchError) as told:
        import_folder(request(home))
    assert "50000 of 50000 cases" in str(told.value)
    assert len(str(told.value)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# real files


@pytest.mark.realdata
def test_hippocampus_is_imported_and_predicted_on_its_own_grid(data_folder: Path, tmp_path: Path) -> None:
    files = sorted((data_folder / "hippocampus/images").iterdir())
    for path in files[:8]:
        for part in ("images", "labels"):
            (tmp_path / "hippo" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "hippo" / part / path.name).write_bytes(
                (data_folder / "hippocampus" / part / path.name).read_bytes()
            )
    store, mask = str(tmp_path / "store"), tmp_path / "mask.nii.gz"
    said = call("data", "import", str(tmp_path / "hippo"), "--name", "mine", "--store", store, "--jobs", "1")
    assert said.exit_code == 0, said.output
    assert not run(tmp_path / "hippo", labels=(2,)).failures
    done = call(
        "predict", "latest", str(files[9]), "-o", str(mask), "--ssl", "mt", "--variant", "cfr", "--store", store
    )
    assert done.exit_code == 0, done.output
    assert nib.load(mask).affine.tobytes() == nib.load(files[9]).affine.tobytes()
    assert nib.load(mask).shape == nib.load(files[9]).shape
