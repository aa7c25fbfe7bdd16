"""`data prepare la` on tiny NRRD files: the original's steps retold, margins by seed, damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest

from cfrbench.errors import DataError
from tests.data.public_files import arrays, opened, prepare, scan, write_nrrd


def la_root(root: Path, shape: tuple[int, int, int] = (40, 36, 12)) -> Path:
    """Three raw scans under ids of the field's lists."""
    for number, case in enumerate(("06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU", "UPT6DX9IQY9JAZ7HJKA7")):
        image, label = scan(number, shape)
        write_nrrd(root / case / "lgemri.nrrd", image.astype(np.uint8))
        write_nrrd(root / case / "laendo.nrrd", label * np.uint8(255))
    return root


SMALL = {"least_sides": (14, 8, 4), "margin_xy": (2, 5), "margin_z": (1, 1)}


def test_la_is_normalised_whole_and_then_cut_in_x_and_y_alone(tmp_path: Path) -> None:
    done = prepare("la", la_root(tmp_path / "raw"), tmp_path / "set", reading=SMALL | {"margin_xy": (3, 3)})
    image, label = scan(0, (40, 36, 12))
    whole = image.astype(np.uint8).astype(np.float64)
    whole = ((whole - whole.mean()) / whole.std()).astype(np.float32)
    limits = []
    for axis in (0, 1):
        found = np.nonzero(label)[axis]
        half = max(SMALL["least_sides"][axis] - (found.max() - found.min()), 0) // 2
        limits.append(slice(max(found.min() - 3 - half, 0), min(found.max() + 3 + half, label.shape[axis])))
    ours, target = arrays(done, "06SR5RBREL16DQ6M8LWS")
    np.testing.assert_allclose(ours, whole[tuple(limits)], atol=1e-5)
    assert np.array_equal(target, label[tuple(limits)])
    record = done.prepared.case("06SR5RBREL16DQ6M8LWS")
    assert record.shape[2] == 12
    assert record.steps == ("cut xy around the label", "normalise zscore")
    assert record.spacing_mm == (0.625, 0.625, 0.625)
    source = opened("la", tmp_path / "set")
    assert (source.axcodes, source.scan_steps.normalise) == ("LPS", "zscore")


def test_la_margins_are_a_function_of_seed_and_case(tmp_path: Path) -> None:
    raw = la_root(tmp_path / "raw")
    shapes = [
        [prepare("la", raw, tmp_path / name, reading=SMALL | {"seed": seed, "cut": cut}).prepared.case(case).placement
         for case in ("06SR5RBREL16DQ6M8LWS", "UPT6DX9IQY9JAZ7HJKA7")]
        for name, seed, cut in (("a", 0, "xy"), ("b", 0, "xy"), ("c", 1, "xy"), ("d", 0, "xyz"), ("e", 0, "none"))
    ]  # fmt: skip
    assert shapes[0] == shapes[1]
    assert shapes[0] != shapes[2]
    assert shapes[3][0].sides[:2] == shapes[0][0].sides[:2]
    assert shapes[3][0].sides[2] < 12
    assert shapes[4][0].untouched


def test_la_masks_go_back_onto_the_whole_scan(tmp_path: Path) -> None:
    done = prepare("la", la_root(tmp_path / "raw"), tmp_path / "set", reading=SMALL)
    case = "0RZDK210BSMWAA6467LU"
    done.prepared.write_label(case, arrays(done, case)[1], tmp_path / "mask.nii.gz")
    mask = nib.load(tmp_path / "mask.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
    assert np.array_equal(np.asarray(mask.dataobj), scan(1, (40, 36, 12))[1])
    assert np.allclose(mask.affine, np.diag([-0.625, -0.625, 0.625, 1]))


def test_la_without_a_label_cannot_be_cut_around_it(tmp_path: Path) -> None:
    raw = la_root(tmp_path / "raw")
    (raw / "0RZDK210BSMWAA6467LU" / "laendo.nrrd").unlink()
    with pytest.raises(DataError, match="--set cut=none"):
        prepare("la", raw, tmp_path / "set")
    kept = prepare("la", raw, tmp_path / "set", reading={"cut": "none"})
    assert kept.prepared.label("0RZDK210BSMWAA6467LU") is None
    skipped = prepare("la", raw, tmp_path / "other", skip_bad=True)
    assert "0RZDK210BSMWAA6467LU" in skipped.prepared.record.left_out
    assert "1 left out" in skipped.prepared.record.note


def cut_short(path: Path) -> None:
    """Lose the end of a file."""
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "no readable NRRD file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(b"not a scan\n\n"), "does not begin with an NRRD header"),
        (lambda p: nrrd.write(str(p), scan(0)[0][0], {"encoding": "gzip"}), "3D volume"),
        (lambda p: write_nrrd(p, scan(0)[0], encoding="bzip2"), "encoded as bzip2"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"sizes: 40 36", b"sizes: 90 90", 1)), "readable|cannot hold"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"sizes: 40", b"sizes: 99999999", 1)), "GiB unpacked"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"encoding:", b"data file: /etc/passwd\nencoding:", 1)),
         "voxels in another file"),
        (lambda p: write_nrrd(p, scan(0)[0], **{"space directions": np.zeros((3, 3))}), "no three axes"),
        (lambda p: write_nrrd(p, scan(0)[0]), "belong together"),
    ],
)  # fmt: skip
def test_wrong_nrrd_files_are_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    raw = la_root(tmp_path / "raw")
    file = raw / "06SR5RBREL16DQ6M8LWS" / "lgemri.nrrd"
    damage(file)
    with pytest.raises(DataError, match=words) as error:
        prepare("la", raw, tmp_path / "set")
    assert "06SR5RBREL16DQ6M8LWS" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [{"encoding": "raw"}, {"space": "right-anterior-superior"}, {"endian": "big"}])
def test_nrrd_variants_hold_the_same_voxels(tmp_path: Path, how: dict[str, str]) -> None:
    raw = la_root(tmp_path / "raw")
    case = "06SR5RBREL16DQ6M8LWS"
    first = arrays(prepare("la", raw, tmp_path / "a"), case)
    write_nrrd(raw / case / "lgemri.nrrd", scan(0, (40, 36, 12))[0].astype(np.uint16), **how)
    again = prepare("la", raw, tmp_path / "b")
    assert all(np.array_equal(one, other) for one, other in zip(first, arrays(again, case), strict=True))
