"""Real files through the data sets they belong to: loaded, prepared, and one smoke run of each kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cfrbench
from cfrbench import registry
from cfrbench.cli import app
from cfrbench.cli import data as _data  # noqa: F401 - registers itself
from cfrbench.prepared.preparing import PrepareRequest, prepare_set

pytestmark = pytest.mark.realdata
nifti: Any = nib
ORGANS = "1=spleen,2=right kidney,3=left kidney,5=liver,6=stomach"  # of the first TotalSegmentator scheme


def opened(name: str, root: Path) -> Any:
    """A data set on a folder."""
    return registry.load("data", name)(root=root)


def command(*words: str) -> Any:
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "folder", "cases", "values"),
    [
        ("la", "la", 28, 2),
        ("la", "samples/la_uamt", 2, 2),
        ("acdc", "samples/acdc_wsl4mis", 4, 4),
        ("hippocampus", "hippocampus", 40, 3),
    ],
)
def test_every_real_file_loads_as_it_is(data_folder: Path, name: str, folder: str, cases: int, values: int) -> None:
    source = opened(name, data_folder / folder)
    split = source.split()
    names = [*split.train, *split.val, *split.test]
    assert len(names) == len(source.fingerprint()) == cases
    assert split.note
    for case in names:
        volume = source.load(case)
        assert set(torch.unique(volume.label).tolist()) == set(range(values))


def test_acdc_lists_put_the_sample_where_ssl4mis_has_its_patients(data_folder: Path) -> None:
    split = opened("acdc", data_folder / "samples" / "acdc_wsl4mis").split()
    assert split.train == ("patient041_frame01", "patient041_frame11", "patient037_frame01")
    assert split.test == ("patient080_frame01",)
    assert split.note == "2 of 70 training and 1 of 20 test patients present"


def test_hippocampus_voxels_are_those_of_its_description(data_folder: Path) -> None:
    source = opened("hippocampus", data_folder / "hippocampus")
    counts = {"hippocampus_001": (1324, 1624), "hippocampus_155": (2046, 1509), "hippocampus_320": (1054, 1397)}
    for case, expected in counts.items():
        assert tuple(torch.bincount(source.load(case).label.flatten().long()).tolist()[1:]) == expected


def test_brats_sample_is_prepared_to_its_brain_with_the_whole_tumour(data_folder: Path, tmp_path: Path) -> None:
    steps = {"crop": "above-minimum", "normalise": "zscore-above-minimum"}
    source = opened("brats19", data_folder / "samples" / "brats_deepmedic")
    done = prepare_set(PrepareRequest(source, tmp_path / "set", steps=steps))
    boxes = {
        "brats_2013_pat0004_1": ((56, 54, 10), (185, 210, 140)),
        "brats_2013_pat0006_1": ((46, 42, 0), (191, 179, 145)),
    }
    tumour = {"brats_2013_pat0004_1": 120_674, "brats_2013_pat0006_1": 217_380}
    for case, (start, stop) in boxes.items():
        record = done.prepared.case(case)
        assert (record.placement.start, record.placement.stop) == (start, stop)  # as measured for SOURCE.md
        assert record.voxels[1] == tumour[case]
        done.prepared.write_label(case, np.asarray(done.prepared.label(case)), tmp_path / "back.nii.gz")
        mine, given = nifti.load(tmp_path / "back.nii.gz"), nifti.load(source.folder() / f"{case}_seg.nii.gz")
        assert np.array_equal(mine.affine, given.affine)
        assert np.array_equal(np.asarray(mine.dataobj), np.asarray(given.dataobj) > 0)


def cut(file: Path, target: Path, low: int, high: int) -> None:
    """Write the slices from ``low`` on and before ``high`` of a scan, in their places."""
    target.parent.mkdir(parents=True, exist_ok=True)
    nifti.save(nifti.load(file).slicer[:, :, low:high], target)


def test_smoke_run_on_the_brats_sample(data_folder: Path, tmp_path: Path) -> None:
    sample, raw, store = data_folder / "samples" / "brats_deepmedic", tmp_path / "raw", tmp_path / "store"
    # Two scans are one labelled and one test case: half of the first stands for an unlabelled one.
    for ending in ("flair", "seg"):
        name = f"brats_2013_pat0006_1_{ending}.nii.gz"
        cut(sample / name, raw / f"a_{ending}.nii.gz", 0, 72)
        cut(sample / name, raw / f"b_{ending}.nii.gz", 72, 145)
        (raw / f"c_{ending}.nii.gz").symlink_to(sample / f"brats_2013_pat0004_1_{ending}.nii.gz")
    (raw / "train.list").write_text("a\nb\n")
    (raw / "test.list").write_text("c\n")
    told = command("data", "prepare", "brats19", "--raw", str(raw), "--store", str(store), "--crop", "above-minimum",
                   "--normalise", "zscore-above-minimum")  # fmt: skip
    assert (told["train"], told["test"]) == (["a", "b"], ["c"])
    result = cfrbench.run(dataset="brats19", preset="smoke", ssl=["mt"], labels=[1], store=store)
    table = result.table()
    assert set(table["variant"]) >= {"baseline", "cfr", "pseudo-label"}
    assert set(table["net"]) == {"unet3d"}


def test_smoke_run_on_the_ct_sample(data_folder: Path, tmp_path: Path) -> None:
    sample, store = data_folder / "samples" / "ct_totalsegmentator", tmp_path / "store"
    # One scan in three slabs: enough for a labelled, an unlabelled and a test case of a smoke run.
    for number, (low, high) in enumerate(((0, 50), (50, 80), (80, 112))):
        cut(sample / "example_ct.nii.gz", tmp_path / "ct" / "images" / f"slab{number}.nii.gz", low, high)
        cut(sample / "example_seg_v1.nii.gz", tmp_path / "ct" / "labels" / f"slab{number}.nii.gz", low, high)
    told = command("data", "import", str(tmp_path / "ct"), "--name", "ct", "--store", str(store), "--labels-map",
                   ORGANS, "--window=-175,250", "--test-cases", "slab1")  # fmt: skip
    assert told["classes"] == ["background", "spleen", "right kidney", "left kidney", "liver", "stomach"]
    result = cfrbench.run(dataset="ct", preset="smoke", ssl=["mt"], labels=[1], store=store)
    assert set(result.table()["variant"]) >= {"baseline", "cfr", "pseudo-label"}
    assert set(result.cases["class"].dropna()) >= {"spleen", "liver", "stomach"}
