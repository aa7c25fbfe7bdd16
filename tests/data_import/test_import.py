"""Anybody's folder becomes a data set that trains, and its labels go back to where they came from."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cfrbench
from cfrbench.cli import app, data  # noqa: F401 - it registers
from cfrbench.errors import CfrbenchError
from cfrbench.prepared.importing import ImportRequest, import_folder
from cfrbench.prepared.reading import PreparedSet

nib: Any = nibabel
SHAPE = (16, 16, 16)


def write(path: Path, voxels: Any, affine: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)


def volume(number: int, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any]:
    """A bright box on noise, elsewhere in each case, and its label: values 0, 1, 2."""
    rng = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    x, y, z = rng.integers(1, 6, 3)
    label[x : x + 8, y : y + 7, z : z + 6] = 1
    label[x : x + 3, y : y + 7, z : z + 6] = 2
    return (rng.normal(0, 20, shape) + 100 * label).astype(np.int16), label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six cases; names have a blank and a letter outside of ASCII."""
    home = tmp_path / "my scäns"
    for number in range(6):
        image, label = volume(number)
        write(home / "images" / f"case {number}.nii.gz", image)
        write(home / "labels" / f"case {number}.nii.gz", label)
    return home


def request(folder: Path, **fields: Any) -> ImportRequest:
    return ImportRequest(folder, fields.pop("name", "mine"), folder.parent / "store", **fields)


def test_a_folder_becomes_a_data_set_that_trains(folder: Path) -> None:
    store = folder.parent / "store"
    arguments = ["data", "import", str(folder), "--name", "mine", "--store", str(store), "--jobs", "1"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    small = {"training.patch": (16, 16, 16), "tuning.patch": (16, 16, 16)}
    result = cfrbench.run(dataset="mine", ssl=("mt",), labels=(1,), preset="smoke", set=small, store=store)
    table = result.table()
    assert not result.failures
    assert {"baseline", "cfr"} <= {row["variant"] for row in result.as_json()["rows"]}
    assert len(table) > 0


def test_what_is_prepared_is_what_was_given(folder: Path) -> None:
    done = import_folder(request(folder))
    assert set(done.prepared.record.train) | set(done.prepared.record.test) == {f"case {n}" for n in range(6)}
    assert len(done.prepared.record.class_names) == 3
    opened = PreparedSet.open(done.prepared.folder)
    for number in range(6):
        image, label = volume(number)
        np.testing.assert_array_equal(opened.image(f"case {number}"), image)
        np.testing.assert_array_equal(opened.label(f"case {number}"), label)


def test_a_second_import_does_nothing_anew(folder: Path) -> None:
    first = import_folder(request(folder)).prepared.folder
    times = {path: path.stat().st_mtime_ns for path in sorted(first.rglob("*.npy")) if path.parent != first}
    assert len(times) == 12
    import_folder(request(folder))
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_changed_array_is_found(folder: Path) -> None:
    opened = import_folder(request(folder)).prepared
    opened.verify("case 0")
    image = next((opened.folder / "cases").glob("case*0/image.npy"))
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    with pytest.raises(CfrbenchError, match=r"image\.npy"):
        opened.verify("case 0")


# ---------------------------------------------------------------------------------------------------------------------
# there and back

ORIENTATIONS = ["".join(c) for axes in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*axes)]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ORIENTATIONS), st.floats(-20, 20), st.tuples(*[st.floats(0.5, 4)] * 3), st.integers(0, 99))
def test_labels_go_back_voxel_for_voxel(
    tmp_path_factory: pytest.TempPathFactory, axcodes: str, degrees: float, spacing: tuple[float, ...], seed: int
) -> None:
    """Whatever the orientation of the file, its spacing, and how it lies in the scanner."""
    home = tmp_path_factory.mktemp("there") / "folder"
    image, label = volume(seed, (16, 18, 20))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axcodes))
    )
    a = np.deg2rad(degrees)
    oblique = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.diag(spacing)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = oblique, (5, -7, 11)
    stored_affine = affine @ nib.orientations.inv_ornt_aff(turn, image.shape)
    for part, voxels in (("images", image), ("labels", label)):
        for case in ("a", "b"):
            noise = 0 if part == "labels" else np.random.default_rng(ord(case)).integers(0, 99, image.shape)
            stored = nib.orientations.apply_orientation((voxels + noise).astype(voxels.dtype), turn)
            write(home / part / f"{case}.nii.gz", stored, stored_affine)
    opened = import_folder(request(home, name="set")).prepared
    prepared = opened.label("a")
    assert prepared is not None
    opened.write_label("a", np.asarray(prepared), home.parent / "back.nii.gz")
    source, back = nib.load(home / "labels" / "a.nii.gz"), nib.load(home.parent / "back.nii.gz")
    assert np.array_equal(back.affine, nib.load(home / "images" / "a.nii.gz").affine)
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(source.dataobj))


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong is told, with the name of the file


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def _four_axes(path: Path) -> None:
    write(path, np.zeros((*SHAPE, 3), np.int16))


def _other_shape(path: Path) -> None:
    write(path, np.zeros((16, 16, 8), np.int16))


def _elsewhere(path: Path) -> None:
    write(path, nib.load(path).get_fdata().astype(np.int16), np.diag([1.0, 1.0, 3.0, 1.0]))


def _not_a_number(path: Path) -> None:
    write(path, np.full(SHAPE, np.nan, np.float32))


def _colours(path: Path) -> None:
    write(path, np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))


def _text(path: Path) -> None:
    path.write_bytes(gzip.compress(b"not a scan at all" * 99))


def _bomb(path: Path) -> None:
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.float64), np.eye(4)).header
    header.set_data_shape((32000, 32000, 32000))
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4)))


DAMAGE = (_empty, _truncated, _four_axes, _other_shape, _elsewhere, _not_a_number, _colours, _text, _bomb)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_image_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "images" / "case 3.nii.gz")
    with pytest.raises(CfrbenchError) as told:
        import_folder(request(folder))
    assert "case 3" in str(told.value)
    assert "case 2" not in str(told.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_image_can_be_left_out(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "images" / "case 3.nii.gz")
    record = import_folder(request(folder, skip_bad=True)).prepared.record
    assert set(record.cases) == {f"case {n}" for n in (0, 1, 2, 4, 5)}


def test_labels_between_whole_numbers_are_refused(folder: Path) -> None:
    write(folder / "labels" / "case 1.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(CfrbenchError, match="case 1"):
        import_folder(request(folder))


def test_the_name_of_a_built_in_is_refused(folder: Path) -> None:
    with pytest.raises(CfrbenchError, match="la"):
        import_folder(request(folder, name="la", builtin=("la", "phantom")))


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CfrbenchError, match="nothing"):
        import_folder(request(tmp_path / "nothing"))


@pytest.mark.parametrize("flip", [False, True])
def test_one_image_under_two_names_is_told(folder: Path, flip: bool) -> None:
    image, label = volume(2)
    turned = (slice(None, None, -1),) if flip else (slice(None),)
    write(folder / "images" / "other.nii.gz", image[turned].copy())
    write(folder / "labels" / "other.nii.gz", label[turned].copy())
    with pytest.raises(CfrbenchError) as told:
        import_folder(request(folder))
    assert "case 2" in str(told.value)
    assert "other" in str(told.value)
