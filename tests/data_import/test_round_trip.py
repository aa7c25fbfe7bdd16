"""A scan in, its own label out: voxel for voxel, whatever the orientation, the spacing, and how it lay there."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from cfrbench import prediction
from cfrbench.compute import Compute
from cfrbench.prepared import label_maps
from cfrbench.prepared.form import SetRecord
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.reading import PreparedSet
from cfrbench.prepared.writing import CaseJob, prepare_case
from tests.data_import.sound_files import save

nib: Any = nibabel
NAMES = label_maps.of_names({0: "background", 1: "one", 2: "two"})
ORIENTATIONS = ["".join(c) for axes in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*axes)]
ANGLES = st.tuples(*[st.floats(-40, 40)] * 3)
SPACINGS = st.tuples(*[st.floats(0.3, 6)] * 3)
LABELS = arrays.arrays(np.uint8, st.tuples(*[st.integers(2, 6)] * 3), elements=st.integers(0, 2))


def stored(label: Any, axcodes: str, degrees: tuple[float, ...], spacing: tuple[float, ...]) -> tuple[Any, Any]:
    """Voxels and affine of a file whose axes are ``axcodes``, but for a rotation about all three of them."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[[one, one, other, other], [one, other, one, other]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        turn = turn @ step
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(spacing), (5, -7, 11)
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axcodes)
    )
    voxels = nib.orientations.apply_orientation(label, change)
    return voxels, affine @ nib.orientations.inv_ornt_aff(change, label.shape)


def voxels_of(path: Path) -> Any:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LABELS, ANGLES, SPACINGS)
def test_an_imported_label_goes_back_to_its_file(
    tmp_path: Path, axcodes: str, label: Any, degrees: tuple[float, ...], spacing: tuple[float, ...]
) -> None:
    voxels, affine = stored(label, axcodes, degrees, spacing)
    save(tmp_path / "image.nii", np.arange(voxels.size, dtype=np.int16).reshape(voxels.shape), affine)
    save(tmp_path / "label.nii", voxels, affine)
    files = {part: tmp_path / f"{part}.nii" for part in ("image", "label")}
    record = prepare_case(tmp_path, CaseJob("a", files, read_pair, NAMES, options=Reading().model_dump(mode="json")))
    about = SetRecord(name="set", title="set", class_names=NAMES.names, axcodes="RAS", train=("a",), test=(),
                      cases={"a": record.fingerprint})  # fmt: skip
    opened = PreparedSet(tmp_path, about)
    prepared = opened.label("a")
    assert prepared is not None
    opened.write_label("a", np.asarray(prepared), tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(voxels_of(tmp_path / "back.nii.gz"), voxels_of(tmp_path / "label.nii"))
    assert nib.load(tmp_path / "back.nii.gz").affine.tobytes() == nib.load(tmp_path / "image.nii").affine.tobytes()


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LABELS, ANGLES, SPACINGS)
def test_a_prediction_lies_on_its_scan(
    tmp_path: Path, axcodes: str, label: Any, degrees: tuple[float, ...], spacing: tuple[float, ...]
) -> None:
    """`predict` with a network that answers what it is shown: the scan's intensities are its class numbers."""
    label.flat[:2] = 0, 1  # a constant scan is refused
    voxels, affine = stored(label, axcodes, degrees, spacing)
    scan, mask = tmp_path / "scan.nii", tmp_path / "mask.nii"
    save(scan, voxels, affine)
    mask.unlink(missing_ok=True)
    bench: Any = SimpleNamespace(source=SimpleNamespace(axcodes="RAS"), compute=Compute(torch.device("cpu"), "fp32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "segment", lambda network, bench, image: image.array.astype(np.uint8))
        prediction.predict_files(nn.Identity(), bench, scan, mask)
    np.testing.assert_array_equal(voxels_of(mask), voxels_of(scan))
    assert nib.load(mask).affine.tobytes() == nib.load(scan).affine.tobytes()
