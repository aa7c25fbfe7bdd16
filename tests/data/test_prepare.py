"""`data prepare` on tiny raw and community files: steps against retellings of the originals, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from skimage import exposure
from typer.testing import CliRunner

from cfrbench.cli import app
from cfrbench.cli import data as _data  # noqa: F401 - they register themselves
from cfrbench.cli import run as _run  # noqa: F401
from cfrbench.errors import ConfigError, DataError, UsageError
from cfrbench.prepared.filling import alone
from cfrbench.prepared.preparing import PrepareRequest, look, prepare_set
from cfrbench.prepared.splits import SplitChoice
from tests.data.la_files import write_h5
from tests.data.public_files import arrays, opened, prepare, scan, write_lists, write_nifti, write_task

# ---------------------------------------------------------------------------------------------------------------------
# BraTS


def ssl4mis(image: Any, label: Any) -> tuple[Any, Any]:
    """What SSL4MIS's script does with one scan, retold."""
    box = tuple(slice(found.min(), found.max()) for found in np.nonzero(image))  # the last slices are lost
    image, label = image[box], label[box]
    share, level = exposure.cumulative_distribution(image)  # type: ignore[no-untyped-call]
    image = np.clip(image, image.min(), level[share >= 0.999][0])
    brain = image[image > 0]
    return ((image - brain.mean()) / brain.std()).astype(np.float32), (label > 0).astype(np.uint8)


def brats_root(root: Path, names: tuple[str, ...] = ("BraTS19_TCIA02_370_1", "BraTS19_TCIA02_309_1")) -> Path:
    """Raw scans with a rim of zeros, as the challenge packs them."""
    for number, case in enumerate(names):
        image, label = scan(number, classes=5)
        image[[0, 1, -1]], image[:, :3], image[..., -2:] = 0, 0, 0
        for ending, array in (("flair", image), ("t1", image + 1), ("seg", label)):
            write_nifti(root / "HGG" / case / f"{case}_{ending}.nii.gz", array, axcodes="LPS")
    return root


def test_brats_is_what_the_published_files_load_as(tmp_path: Path) -> None:
    done = prepare("brats19", brats_root(tmp_path / "raw"), tmp_path / "set")
    source = opened("brats19", tmp_path / "set")
    for case in (*source.split().train, *source.split().test):
        files = [nib.load(tmp_path / "raw" / "HGG" / case / f"{case}_{e}.nii.gz") for e in ("flair", "seg")]  # type: ignore[no-untyped-call, attr-defined]
        image, label = ssl4mis(*(np.asarray(file.dataobj) for file in files))
        # The published h5 holds the same with its axes the other way round.
        write_h5(tmp_path / "h5" / f"{case}.h5", image=image.T, label=label.T)
        ours, theirs = source.load(case), opened("brats19", tmp_path / "h5").load(case)
        np.testing.assert_allclose(ours.image.numpy(), theirs.image.numpy(), atol=2e-6)
        assert np.array_equal(ours.label.numpy(), theirs.label.numpy())
    assert source.split().note == "1 of 250 training and 1 of 60 test cases present"
    assert (source.axcodes, source.scan_steps.crop) == ("LPS", "nonzero-open")
    assert done.notes == ()


def test_a_background_that_is_not_zero_is_noticed_and_can_be_cut(tmp_path: Path) -> None:
    for number, case in enumerate(("a", "b", "c")):  # ids of no list, files side by side, as other copies have them
        image, label = scan(number)
        shifted = image.astype(np.float32)
        shifted[:4] = -5
        write_nifti(tmp_path / "raw" / f"{case}_flair.nii.gz", shifted - 60, axcodes="LPS")
        write_nifti(tmp_path / "raw" / f"{case}_seg.nii.gz", label, axcodes="LPS")
    done = prepare("brats19", tmp_path / "raw", tmp_path / "plain", split=SplitChoice(test=1))
    assert any("--crop above-minimum" in note for note in done.notes)
    assert done.prepared.record.note.startswith("own split with seed 0")
    steps = {"crop": "above-minimum", "normalise": "zscore-above-minimum", "clip_above": None}
    cut = prepare("brats19", tmp_path / "raw", tmp_path / "cut", steps=steps)
    assert cut.prepared.case("a").shape == (20, 20, 12)
    assert cut.notes == ()
    image = arrays(cut, "a")[0]
    seen = image[image > image.min()]
    assert abs(float(seen.mean())) < 1e-4
    assert float(seen.std()) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# CT


def test_btcv_is_resampled_and_normalised_and_windows_on_demand(tmp_path: Path) -> None:
    for number, case in enumerate(("0006", "0039", "0008")):
        image, label = scan(number, classes=14)
        write_nifti(tmp_path / "raw" / "Training" / "img" / f"img{case}.nii.gz", image, (0.75, 0.75, 4))
        write_nifti(tmp_path / "raw" / "Training" / "label" / f"label{case}.nii.gz", label, (0.75, 0.75, 4))
    done = prepare("btcv", tmp_path / "raw", tmp_path / "set")
    record = done.prepared.case("0006")
    assert (record.shape, record.spacing_mm) == ((12, 10, 24), (1.5, 1.5, 2))
    assert (record.statistics.mean, record.statistics.deviation) == pytest.approx((0, 1), abs=1e-4)
    assert done.prepared.record.train == ("0006", "0039")  # the effective order
    windowed = prepare("btcv", tmp_path / "raw", tmp_path / "other", steps={"window": (70, 80), "normalise": "none"})
    assert (windowed.prepared.case("0006").statistics.low, windowed.prepared.case("0006").statistics.high) == (70, 80)


def mact_root(root: Path, shape: tuple[int, int, int] = (24, 20, 12), box: str = "2,20,3,17,1,11") -> Path:
    """Two TCIA and two BTCV scans, one label without an image, the withdrawn scan, and the table of boxes."""
    rows = ["original_id,publisher,extent_left,extent_right,extent_ant,extent_post,extent_inf,extent_sup"]
    for number, (source, case) in enumerate((("tcia", "0001"), ("tcia", "0025"), ("btcv", "0001"), ("btcv", "0061"))):
        image, label = scan(number, shape, classes=15)
        write_nifti(root / f"label_{source}_multiorgan" / f"label{case}.nii.gz", label, (1.5, 1.5, 2), "LPS")
        folder = f"image_{source}_multiorgan" if case != "0061" else "RawData/Testing/img"
        write_nifti(root / folder / f"img{case}.nii.gz", image, (1.5, 1.5, 2), "LPS")
        rows.append(f"{int(case)},{source.upper()},{box}")
    write_nifti(root / "label_tcia_multiorgan" / "label0002.nii.gz", label, (1.5, 1.5, 2), "LPS")
    (root / "cropping.csv").write_text("\n".join(rows))
    return root


def test_mact_is_cut_to_its_boxes_and_keeps_the_papers_organs(tmp_path: Path) -> None:
    done = prepare("mact", mact_root(tmp_path / "raw"), tmp_path / "set", split=SplitChoice(test=1))
    cases = {*done.prepared.record.train, *done.prepared.record.test}
    assert cases == {"tcia-0001", "btcv-0001", "btcv-0061"}
    assert done.prepared.record.left_out["tcia-0025"].startswith("withdrawn")
    assert done.prepared.record.left_out["tcia-0002"] == "without an image"
    assert done.prepared.record.note.startswith("own split with seed 0")
    _, label = scan(0, classes=15)
    inside = label[2:20, 3:17, 1:11]
    expected = np.zeros_like(inside)
    for raw, column in ((1, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6), (11, 7), (14, 8)):
        expected[inside == raw] = column
    stored = arrays(done, "tcia-0001")[1]
    # The table counts from right and front, arrays from left and back.
    assert np.array_equal(stored[::-1, ::-1], expected)
    done.prepared.write_label("tcia-0001", stored, tmp_path / "back.nii.gz")
    back = np.asarray(nib.load(tmp_path / "back.nii.gz").dataobj)  # type: ignore[no-untyped-call, attr-defined]
    assert np.array_equal(back[2:20, 3:17, 1:11], expected)
    assert back.sum() == expected.sum()


@pytest.mark.parametrize(("box", "words"), [("0,3,0,3,0,3", "labelled voxels"), ("9,9,0,5,0,5", "is empty")])
def test_a_box_of_another_scan_is_noticed(tmp_path: Path, box: str, words: str) -> None:
    raw = mact_root(tmp_path / "raw", box=box)
    with pytest.raises(DataError, match=words):
        prepare("mact", raw, tmp_path / "set")
    whole = prepare("mact", raw, tmp_path / "set", reading={"box": "none"}, split=SplitChoice(test=1))
    assert whole.prepared.case("tcia-0001").shape == (24, 20, 12)


def test_a_table_without_its_columns(tmp_path: Path) -> None:
    raw = mact_root(tmp_path / "raw")
    (raw / "cropping.csv").write_text("id,x\n1,2\n")
    with pytest.raises(DataError, match=r"cropping\.csv lacks the columns"):
        prepare("mact", raw, tmp_path / "set")


# ---------------------------------------------------------------------------------------------------------------------
# heart and Decathlon


def test_acdc_from_the_challenge_keeps_frames_of_a_patient_together(tmp_path: Path) -> None:
    for number, name in enumerate(("041_frame01", "041_frame11", "080_frame01")):
        image, label = scan(number, (24, 20, 6), classes=4)
        folder = tmp_path / "raw" / "training" / f"patient{name[:3]}"
        write_nifti(folder / f"patient{name}.nii.gz", image, (1.5, 1.5, 10))
        write_nifti(folder / f"patient{name}_gt.nii.gz", label, (1.5, 1.5, 10))
        write_nifti(folder / f"patient{name[:3]}_4d.nii.gz", np.stack([image, image], -1), (1.5, 1.5, 10))
    done = prepare("acdc", tmp_path / "raw", tmp_path / "set")
    record = done.prepared.record
    assert record.train == ("patient041_frame01", "patient041_frame11")
    assert record.patients["patient041_frame11"] == "patient041"
    assert done.prepared.case(record.test[0]).statistics.high < scan(2, (24, 20, 6), classes=4)[0].max()


def test_a_task_is_prepared_with_its_classes(tmp_path: Path) -> None:
    raw = write_task(tmp_path / "raw", channels=2)
    source = opened("msd", raw, channel=1)
    prepare_set(PrepareRequest(source, tmp_path / "set"))
    again = opened("msd", tmp_path / "set")
    assert again.class_names == source.class_names
    assert again.split() == source.split()
    for case in again.split().train:
        assert np.array_equal(again.load(case).image.numpy(), source.load(case).image.numpy())
    assert again.protocol("quick") == source.protocol("quick")
    assert opened("msd", **again.config.model_dump(mode="json")).class_names == source.class_names


# ---------------------------------------------------------------------------------------------------------------------
# any set


def btcv_root(root: Path) -> Path:
    """Community files of three cases."""
    for number, case in enumerate(("0006", "0039", "0008")):
        image, label = scan(number, classes=14)
        write_h5(root / f"{case}.h5", image=image, label=label)
    return root


def test_community_files_load_the_same_prepared_and_not(tmp_path: Path) -> None:
    raw = btcv_root(tmp_path / "raw")
    prepare("btcv", raw, tmp_path / "set")
    plain, made = opened("btcv", raw), opened("btcv", tmp_path / "set")
    assert made.split() == plain.split()
    assert made.split().note == plain.split().note == "2 of 18 training and 1 of 12 test cases present"
    for case in ("0006", "0039", "0008"):
        one, other = plain.load(case), made.load(case)
        assert np.array_equal(one.image.numpy(), other.image.numpy())
        assert np.array_equal(one.label.numpy(), other.label.numpy())
        assert one.spacing_mm == other.spacing_mm
    assert made.signatures() is not None
    assert plain.signatures() is None
    with pytest.raises(DataError, match="prepared data set 'btcv', not 'mact'"):
        opened("mact", tmp_path / "set")


def test_given_again_it_verifies_and_goes_on(tmp_path: Path) -> None:
    raw, folder = btcv_root(tmp_path / "raw"), tmp_path / "set"
    prepare("btcv", raw, folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("cases/*/*.npy")}
    (folder / "prepared.json").unlink()  # as if it had been stopped before the end
    image = folder / "cases" / "0039" / "image.npy"
    image.write_bytes(image.read_bytes()[:-1])
    prepare("btcv", raw, folder)
    again = {path: path.stat().st_mtime_ns for path in folder.glob("cases/*/*.npy")}
    assert {path.parent.name for path in times if again[path] != times[path]} == {"0039"}
    with pytest.raises(UsageError, match="--replace"):
        prepare("btcv", raw, folder, steps={"normalise": "zscore"})
    changed = prepare("btcv", raw, folder, steps={"normalise": "zscore"}, replace=True)
    assert changed.prepared.case("0039").statistics.mean == pytest.approx(0, abs=1e-5)


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    raw = btcv_root(tmp_path / "raw")
    with alone(tmp_path / "set", "at work", "-o"), pytest.raises(UsageError, match="Another process is preparing BTCV"):
        prepare("btcv", raw, tmp_path / "set")


def test_a_copy_in_both_lists_is_refused(tmp_path: Path) -> None:
    raw = btcv_root(tmp_path / "raw")
    image, label = scan(0, classes=14)
    write_h5(raw / "0008.h5", image=image[::-1], label=label[::-1])  # the first training case, mirrored
    with pytest.raises(DataError, match="0006 and 0008 are one image"):
        prepare("btcv", raw, tmp_path / "set")


def test_open_choices_and_wrong_values_are_told(tmp_path: Path) -> None:
    raw = btcv_root(tmp_path / "raw")
    write_nifti(raw / "img" / "img0006.nii.gz", scan(0)[0])
    with pytest.raises(UsageError, match=r"h5 \(3 cases\), raw \(1 cases\)"):
        look(PrepareRequest(opened("btcv", raw), tmp_path / "set"))
    assert look(PrepareRequest(opened("btcv", raw), tmp_path / "set", layout="h5")).layout == "h5"
    with pytest.raises(UsageError, match="no layout 'zip'"):
        look(PrepareRequest(opened("btcv", raw), tmp_path / "set", layout="zip"))
    with pytest.raises(ConfigError, match="spacing"):
        prepare("btcv", raw, tmp_path / "set", layout="h5", reading={"spacing": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file of BTCV"):
        look(PrepareRequest(opened("btcv", tmp_path / "empty"), tmp_path / "set"))


def test_lists_may_lie_elsewhere(tmp_path: Path) -> None:
    raw, lists = btcv_root(tmp_path / "raw"), tmp_path / "lists"
    lists.mkdir()
    write_lists(lists, "0008\n", "0039\n")
    seen = look(PrepareRequest(opened("btcv", raw), tmp_path / "set", lists=lists))
    assert (seen.split.train, seen.split.test) == (("0008",), ("0039",))
    assert seen.left_out == {"0006": "in no list"}


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_prepares_into_the_store_where_run_finds_it(tmp_path: Path) -> None:
    raw, store = btcv_root(tmp_path / "raw"), tmp_path / "store"
    base = ["data", "prepare", "btcv", "--raw", str(raw), "--store", str(store), "--jobs", "1", "--json"]
    dry = CliRunner().invoke(app, [*base, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["train"] == ["0006", "0039"]
    assert not store.exists()
    told = CliRunner().invoke(app, [*base, "--normalise", "zscore", "--window=60,90", "--set", "axcodes=LPS"])
    assert told.exit_code == 0, told.output
    record = json.loads((store / "datasets" / "btcv" / "prepared.json").read_text())
    assert record["scan_steps"]["window"] == [60, 90]
    assert record["axcodes"] == "LPS"
    plan = CliRunner().invoke(app, ["run", "--dataset", "btcv", "--preset", "smoke", "--labels", "1", "--store",
                                    str(store), "--dry-run", "--json"])  # fmt: skip
    assert plan.exit_code == 0, plan.output
    assert json.loads(plan.stdout)["todo"]


def test_the_command_explains_and_refuses(tmp_path: Path) -> None:
    explained = CliRunner().invoke(app, ["data", "prepare", "la", "--explain", "--json"])
    layouts = {row["layout"]: row for row in json.loads(explained.stdout)}
    assert layouts["raw"]["options"]["cut"]["default"] == "xy"
    assert "normalise zscore" in layouts["raw"]["steps"]
    for words in (["phantom"], ["nifti"]):
        refused = CliRunner().invoke(app, ["data", "prepare", *words, "--raw", str(tmp_path)])
        assert isinstance(refused.exception, UsageError | DataError), words
