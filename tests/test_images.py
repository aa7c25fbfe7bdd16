"""NIfTI in and out: whatever the orientation, a label map returns to exactly the grid its image came from."""

from __future__ import annotations

import gzip
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cfrbench.errors import DataError
from cfrbench.images import find_images, image_stem, read_image, read_label, write_label

nib: Any = nibabel  # half-typed upstream
SHAPE = (7, 6, 5)
#: header fields that say where voxels are; they must survive byte for byte
GEOMETRY = ("dim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
            "qoffset_z", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units")  # fmt: skip
ALL_AXCODES = ["".join(signs[axis] for axis in order)
               for order in itertools.permutations(range(3))
               for signs in itertools.product("RL", "AP", "SI")]  # fmt: skip


def oblique_affine(codes: str = "LPS", spacing_mm: tuple[float, float, float] = (0.7, 1.1, 3.0)) -> NDArray[np.float64]:
    """Voxel axes near ``codes``, turned by some degrees, anisotropic, off centre."""
    turn: NDArray[np.float64] = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(codes), nib.orientations.axcodes2ornt("RAS")),
        SHAPE,
    )
    axes = np.linalg.inv(turn)[:3, :3]
    tilt = nib.eulerangles.euler2mat(z=0.2, y=-0.1, x=0.15)
    affine: NDArray[np.float64] = np.eye(4)
    affine[:3, :3] = tilt @ axes @ np.diag(spacing_mm)
    affine[:3, 3] = (-40.5, 12.25, 88.0)
    return affine


def image_values(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def save(path: Path, data: NDArray[Any], affine: NDArray[np.float64] | None = None, **header: Any) -> Path:
    """Save through nibabel, then set raw header fields in the file: nibabel itself would repair them."""
    image = nib.Nifti1Image(data, oblique_affine() if affine is None else affine)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    payload = image.to_bytes()
    raw = nib.Nifti1Header(payload[:348], check=False)
    for name, value in header.items():
        raw[name] = value
    payload = raw.binaryblock + payload[348:]
    path.write_bytes(gzip.compress(payload) if path.name.endswith(".gz") else payload)
    return path


def marked(label: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """World coordinates (sorted) of the voxels of class 1."""
    voxels = np.argwhere(label == 1)
    world: NDArray[np.float64] = nib.affines.apply_affine(affine, voxels)
    return world[np.lexsort(world.T.round(6))]


@pytest.mark.parametrize("codes", ALL_AXCODES)
def test_reading_to_ras_and_writing_back_is_exact(tmp_path: Path, codes: str) -> None:
    data = image_values()
    path = save(tmp_path / "image.nii", data, oblique_affine(codes))
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == codes
    image = read_image(path, axcodes="RAS")
    # The brightest voxels are the label, so each axis and direction matters.
    write_label(tmp_path / "out.nii", (image.array > 115).astype(np.uint8), image)
    written = nib.load(tmp_path / "out.nii")
    assert np.array_equal(np.asarray(written.dataobj), data > 115)
    assert np.array_equal(written.affine, nib.load(path).affine)


@pytest.mark.parametrize(("stored", "wanted"), [("LPS", "RAS"), ("RAI", "LPS"), ("SAR", "RAS"), ("PIL", "SRA")])
def test_canonical_axes_show_the_same_world(tmp_path: Path, stored: str, wanted: str) -> None:
    path = save(tmp_path / "image.nii.gz", image_values(), oblique_affine(stored))
    image = read_image(path, axcodes=wanted)
    assert image.axcodes == wanted
    reference = nib.load(path)
    turned = reference.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(reference.affine), nib.orientations.axcodes2ornt(wanted))
    )
    assert np.allclose(image.array, turned.get_fdata(), atol=1e-4)
    assert np.allclose(image.spacing_mm, nib.affines.voxel_sizes(turned.affine))
    label = (image.array > 110).astype(np.uint8)
    write_label(tmp_path / "out.nii.gz", label, image)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.allclose(marked(np.asarray(written.dataobj), written.affine), marked(label, turned.affine), atol=1e-3)


def test_without_axcodes_the_array_is_as_stored(tmp_path: Path) -> None:
    data = image_values()
    image = read_image(save(tmp_path / "image.nii", data, oblique_affine("RAI")))
    assert np.array_equal(image.array, data)
    assert image.array.dtype == np.float32
    assert image.axcodes == "RAI"
    assert np.allclose(image.spacing_mm, (0.7, 1.1, 3.0))


@settings(max_examples=25, deadline=None)
@given(
    codes=st.sampled_from(ALL_AXCODES),
    wanted=st.sampled_from(ALL_AXCODES),
    spacing_mm=st.tuples(*[st.floats(0.2, 6)] * 3),
    seed=st.integers(0, 99),
)
def test_any_orientation_round_trips(
    tmp_path_factory: pytest.TempPathFactory, codes: str, wanted: str,
    spacing_mm: tuple[float, float, float], seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("trip")
    label = np.random.default_rng(seed).integers(0, 4, SHAPE).astype(np.uint8)
    path = save(folder / "label.nii", label, oblique_affine(codes, spacing_mm))
    image = read_label(path, axcodes=wanted)
    assert sorted(image.spacing_mm) == pytest.approx(sorted(spacing_mm), rel=1e-4)
    write_label(folder / "out.nii", image.array, image)
    assert np.array_equal(np.asarray(nib.load(folder / "out.nii").dataobj), label)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 2), (1, 0), (0, 4), (3, 3), (0, 0)])
def test_geometry_fields_survive_byte_for_byte(tmp_path: Path, suffix: str, qform: int, sform: int) -> None:
    path = save(tmp_path / f"image{suffix}", image_values(), qform_code=qform, sform_code=sform)
    image = read_image(path, axcodes="LAS")
    write_label(tmp_path / f"out{suffix}", np.ones(image.array.shape, np.int64), image)
    before, after = nib.load(path).header, nib.load(tmp_path / f"out{suffix}").header
    for field in GEOMETRY:
        assert before[field].tobytes() == after[field].tobytes(), field


def test_scaled_storage_is_read_in_true_units_and_not_inherited(tmp_path: Path) -> None:
    stored = (image_values() * 10).astype(np.int16)
    image = nib.Nifti1Image(stored, oblique_affine())
    image.header.set_slope_inter(0.25, -1000)
    image.header["cal_max"] = 900
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"about the image"))
    nib.save(image, tmp_path / "image.nii.gz")
    scaled = read_image(tmp_path / "image.nii.gz")
    assert np.allclose(scaled.array, nib.load(tmp_path / "image.nii.gz").get_fdata(), atol=1e-3)
    label = np.arange(stored.size).reshape(SHAPE) % 5
    write_label(tmp_path / "out.nii.gz", label, scaled)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), label)
    assert written.get_data_dtype() == np.uint8
    assert written.header.get_slope_inter() in ((1.0, 0.0), (None, None))
    assert float(written.header["cal_max"]) == 0
    assert len(written.header.extensions) == 0


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_format_version_and_byte_order_are_kept(tmp_path: Path, kind: str, endianness: str) -> None:
    cls = getattr(nib, kind)
    header = cls.header_class(endianness=endianness)
    header.set_data_dtype(np.float32)
    nib.save(cls(image_values(), oblique_affine(), header), tmp_path / "image.nii")
    image = read_image(tmp_path / "image.nii", axcodes="RAS")
    write_label(tmp_path / "out.nii", (image.array > 100).astype(bool), image)
    written = nib.load(tmp_path / "out.nii")
    assert type(written).__name__ == kind
    assert written.header.endianness == endianness
    assert np.array_equal(np.asarray(written.dataobj), image_values() > 100)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("meter", 1000.0), ("micron", 0.001), ("unknown", 1.0)])
def test_spacing_is_in_millimetres(tmp_path: Path, unit: str, factor: float) -> None:
    image = nib.Nifti1Image(image_values(), oblique_affine())
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "image.nii")
    assert np.allclose(read_image(tmp_path / "image.nii").spacing_mm, np.multiply((0.7, 1.1, 3.0), factor))


def test_trailing_axes_of_one_are_dropped_and_restored(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii", image_values()[..., None])
    image = read_image(path, axcodes="RAS")
    assert image.array.ndim == 3
    write_label(tmp_path / "out.nii", (image.array > 100).astype(np.uint8), image)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii").dataobj), image_values()[..., None] > 100)


def test_the_same_label_gives_the_same_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "image.nii.gz", image_values()))
    label = (image.array > 100).astype(np.uint8)
    for name in ("a.nii.gz", "deeper/b.nii.gz"):
        write_label(tmp_path / name, label, image)
    one, two = (tmp_path / "a.nii.gz").read_bytes(), (tmp_path / "deeper" / "b.nii.gz").read_bytes()
    assert one == two
    assert one[4:8] == b"\0\0\0\0"  # no time stamp in the gzip header
    assert len(gzip.decompress(one)) == 352 + label.size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "deeper", "image.nii.gz"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.nii.gz").stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = read_image(save(tmp_path / "image.nii", image_values()))
    write_label(tmp_path / "out.nii", np.ones(SHAPE, np.uint8), image)
    before = (tmp_path / "out.nii").read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((OSError, DataError), match="no space left"):
        write_label(tmp_path / "out.nii", np.zeros(SHAPE, np.uint8), image)
    assert (tmp_path / "out.nii").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii", "out.nii"]


def cut(path: Path) -> None:
    """Keep two thirds of a sound file."""
    data = save(path, image_values()).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def spoil(path: Path) -> None:
    """Change the checksum at the end of a sound gzip file, as any damaged byte before it would."""
    data = bytearray(save(path, image_values()).read_bytes())
    data[-8] ^= 0xFF
    path.write_bytes(bytes(data))


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("image.nii", lambda p: None, "does not exist"),
    ("image.nii.gz", cut, "no readable NIfTI file"),
    ("image.nii", cut, "no readable NIfTI file"),
    ("image.nii.gz", spoil, "no readable NIfTI file"),
    ("image.nii", lambda p: p.write_bytes(b""), "no readable NIfTI file"),
    ("image.nii.gz", lambda p: p.write_text("no gzip"), "no readable NIfTI file"),
    ("image.nrrd", lambda p: p.write_text("x"), "not named as a NIfTI file"),
    ("image.nii", lambda p: save(p, np.zeros((3, 4, 5, 2), np.float32)), r"shape \(3, 4, 5, 2\)"),
    ("image.nii", lambda p: save(p, image_values()[0]), r"shape \(6, 5\)"),
    ("image.nii", lambda p: save(p, np.where(image_values() > 120, np.nan, image_values())), "NaN or infinite"),
    ("image.nii", lambda p: save(p, image_values().astype(np.float64) * 1e200), "210 NaN or infinite"),
    ("image.nii", lambda p: save(p, np.full(SHAPE, 3.5, np.float32)), "every voxel is 3.5"),
    ("image.nii", lambda p: save(p, image_values().astype(np.complex64)), "complex64"),
    ("image.nii", lambda p: save(p, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "scalar intensities"),
    ("image.nii", lambda p: save(p, image_values(), srow_x=[0, 0, 0, 0], qform_code=0), "not invertible"),
    ("image.nii", lambda p: save(p, image_values(), srow_x=[np.nan, 0, 0, 0], qform_code=0), "not invertible"),
]


@pytest.mark.parametrize(("name", "make", "words"), BAD)
def test_bad_images_are_refused_in_one_paragraph(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=words) as error:
        read_image(tmp_path / name, axcodes="RAS")
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("codes", ["RA", "RAR", "XYZ", "RASL", "RLS"])
def test_wrong_axcodes_are_refused(tmp_path: Path, codes: str) -> None:
    with pytest.raises(DataError, match="no orientation"):
        read_image(save(tmp_path / "image.nii", image_values()), axcodes=codes)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (np.zeros((6, 7, 5), np.uint8), "shape"),
        (np.zeros(SHAPE, np.float32), "float32"),
        (np.full(SHAPE, 256), "256"),
        (np.full(SHAPE, -1), "-1"),
    ],
)
def test_wrong_labels_are_refused_before_anything_is_written(tmp_path: Path, label: NDArray[Any], words: str) -> None:
    image = read_image(save(tmp_path / "image.nii", image_values()))
    with pytest.raises(DataError, match=words):
        write_label(tmp_path / "out.nii", label, image)
    assert not (tmp_path / "out.nii").exists()


def test_the_image_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "image.nii", image_values())
    (tmp_path / "link.nii").symlink_to(path)
    image = read_image(path)
    for name in ("image.nii", "link.nii"):
        with pytest.raises(DataError, match="is the image itself"):
            write_label(tmp_path / name, np.zeros(SHAPE, np.uint8), image)
    with pytest.raises(DataError, match="not named as a NIfTI file"):
        write_label(tmp_path / "out.png", np.zeros(SHAPE, np.uint8), image)


def test_label_maps_may_be_empty_or_stored_with_scaling(tmp_path: Path) -> None:
    empty = read_label(save(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8)))
    assert empty.array.dtype == np.uint8
    assert not empty.array.any()
    image = nib.Nifti1Image(np.arange(210, dtype=np.float32).reshape(SHAPE) % 4, oblique_affine())
    image.set_data_dtype(np.int16)  # nibabel then stores 0..3 with a slope, which comes back as 0.9999
    nib.save(image, tmp_path / "scaled.nii")
    assert np.array_equal(read_label(tmp_path / "scaled.nii").array, np.arange(210).reshape(SHAPE) % 4)


@pytest.mark.parametrize("worth", [0.5, -1.0, 256.0, np.nan])
def test_other_things_are_no_label_maps(tmp_path: Path, worth: float) -> None:
    data = np.zeros(SHAPE, np.float32)
    data[2, 2, 2] = worth
    with pytest.raises(DataError, match="no label map"):
        read_label(save(tmp_path / "label.nii", data))


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", ".hidden.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.nii", "b.nii.gz"]
    assert find_images(tmp_path / "a.nii") == [tmp_path / "a.nii"]
    assert [image_stem(p) for p in find_images(tmp_path)] == ["a", "b"]
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(DataError, match=r"holds a both as \.nii and as \.nii\.gz"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(DataError, match="not named as a NIfTI file"):
        find_images(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no NIfTI file"):
        find_images(tmp_path / "empty")
