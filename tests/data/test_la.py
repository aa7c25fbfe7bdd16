"""The LA source on tiny files: layouts, lists, partial sets, and one clear paragraph for everything wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cfrbench import registry
from cfrbench.config import PRESETS, Settings, override
from cfrbench.errors import DataError
from cfrbench_data.la import LAYOUTS, SHIPPED, LeftAtrium
from tests.data.la_files import FOLDER, case_arrays, make_root, write_case, write_h5


def one_paragraph(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    """The message is a single line of prose that names the words."""
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message, message


def test_registry_finds_la() -> None:
    assert registry.load("data", "la") is LeftAtrium


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(tmp_path: Path, layout: str) -> None:
    for number, case in enumerate(("a", "b", "c")):
        write_case(tmp_path, case, number, layout)
    (tmp_path / "train.list").write_text("b\na\n")
    (tmp_path / "test.list").write_text("c\n")
    source = LeftAtrium(root=tmp_path)
    split = source.split()
    assert (split.train, split.test, split.note) == (("b", "a"), ("c",), "")
    volume = source.load("b")
    image, label = case_arrays(1)
    assert torch.equal(volume.image, torch.from_numpy(image))  # stored intensities: standardising is a setting
    assert volume.label is not None
    assert torch.equal(volume.label, torch.from_numpy(label))
    assert volume.spacing_mm == (0.625, 0.625, 0.625)


def test_lists_lose_endings_commas_blank_lines_and_crlf(tmp_path: Path) -> None:
    split = make_root(tmp_path, train="\ufeffb.npy.h5,\r\n\r\n  a.h5 \r\n", test="c.nii.gz").split()
    assert (split.train, split.test) == (("b", "a"), ("c",))


def test_shipped_split_is_the_fields(tmp_path: Path) -> None:
    train, test = ((SHIPPED / f"la_{role}.txt").read_text().split() for role in ("train", "test"))
    assert (len(train), len(test), len({*train, *test})) == (80, 20, 100)
    assert train == sorted(train)
    assert train[0] == "06SR5RBREL16DQ6M8LWS"
    for number, case in enumerate((train[5], train[2], test[3])):
        write_case(tmp_path, case, number)
    split = LeftAtrium(root=tmp_path).split()
    assert (split.train, split.test) == ((train[2], train[5]), (test[3],))  # list order, not the order on disk
    assert split.note == "2 of 80 training and 1 of 20 test cases present"


def test_own_lists_that_are_a_part_of_the_fields_say_so(tmp_path: Path) -> None:
    train, test = ((SHIPPED / f"la_{role}.txt").read_text().split() for role in ("train", "test"))
    for number, case in enumerate((train[1], train[0], test[0])):
        write_case(tmp_path, case, number)
    (tmp_path / "train.list").write_text(f"{train[1]}\n{train[0]}\n")
    (tmp_path / "test.list").write_text(f"{test[0]}\n")
    split = LeftAtrium(root=tmp_path).split()
    assert split.train == (train[1], train[0])
    assert split.note == "2 of 80 training and 1 of 20 test cases present"


def test_fingerprint_is_the_sha256_of_each_file(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    expected = {c: hashlib.sha256((tmp_path / FOLDER / c / "mri_norm2.h5").read_bytes()).hexdigest() for c in "abc"}
    assert source.fingerprint() == expected
    write_case(tmp_path, "b", 77)
    changed = source.fingerprint()
    assert {c for c in "abc" if changed[c] != expected[c]} == {"b"}


@pytest.mark.parametrize("preset", PRESETS)
def test_protocols_are_valid_settings(preset: str) -> None:
    settings = override(Settings(), {**LeftAtrium().protocol(preset)})
    assert all(side % 16 == 0 for side in settings.training.patch)
    patch = settings.tuning.patch or settings.training.patch
    across = settings.tuning.canvas // patch[0]
    assert preset == "paper" or across * (settings.tuning.canvas // patch[1]) >= patch[2]  # the canvas holds the crop


def test_paper_protocol_is_the_published_one() -> None:
    settings = override(Settings(), {**LeftAtrium().protocol("paper")})
    assert settings.training.patch == (112, 112, 80)
    assert (settings.inference.stride_xy, settings.inference.stride_z) == (18, 4)
    assert settings.training.rotflip


# ---------------------------------------------------------------------------------------------------------------------
# the folder and its lists


def test_without_root_says_where_and_how() -> None:
    with pytest.raises(DataError) as error:
        LeftAtrium().split()
    one_paragraph(error, "--data-root", LeftAtrium.origin, "mri_norm2.h5")


def test_root_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        LeftAtrium(root=tmp_path / "nowhere").split()
    one_paragraph(error, "nowhere", LeftAtrium.origin, FOLDER)


def test_root_without_any_case(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        LeftAtrium(root=tmp_path).split()
    one_paragraph(error, str(tmp_path), "None of the 80 training cases", FOLDER)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ("a\nb\n", "b\nc\n", ("b stand", "train list", "test list")),
        ("a\nb\na\n", "c\n", ("train.list", "names a more than once")),
        ("a\na.h5\n", "c\n", ("train.list", "names a more than once")),
        ("", "c\n", ("train.list", "names no case")),
        ("a\n", "\r\n , \r\n", ("test.list", "names no case")),
        ("a\n../b\n", "c\n", ("train.list", "'../b'", "not a case id")),
        ("a\n/etc/x\n", "c\n", ("train.list", "not a case id")),
        ("a\n..\n", "c\n", ("train.list", "not a case id")),
        ("a\n..\\b\n", "c\n", ("train.list", "not a case id")),
        ("a\n.h5\n", "c\n", ("train.list", "not a case id")),
        ("a\nb\0\n", "c\n", ("train.list", "not a case id")),
        ("a\n", "x\ny\n", ("None of the 2 test cases",)),
    ],
)
def test_wrong_lists(tmp_path: Path, train: str, test: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as error:
        make_root(tmp_path, train, test).split()
    one_paragraph(error, *words)


def test_list_that_is_not_text(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    (tmp_path / "train.list").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError) as error:
        source.split()
    one_paragraph(error, "train.list", "cannot be read")


def test_one_list_alone_is_refused(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    (tmp_path / "test.list").unlink()
    with pytest.raises(DataError) as error:
        source.split()
    one_paragraph(error, "has train.list but no test.list")


def test_case_folder_without_its_file_is_damage_not_a_partial_set(tmp_path: Path) -> None:
    source = make_root(tmp_path)
    (tmp_path / FOLDER / "b" / "mri_norm2.h5").unlink()
    with pytest.raises(DataError) as error:
        source.split()
    one_paragraph(error, "case b", "mri_norm2.h5")
    (tmp_path / FOLDER / "b").rmdir()
    assert source.split().note == "1 of 2 training and 1 of 1 test cases present"


@pytest.mark.parametrize("case", ["../x", "a/b", "/a"])
def test_load_never_leaves_the_root(tmp_path: Path, case: str) -> None:
    with pytest.raises(DataError) as error:
        make_root(tmp_path).load(case)
    one_paragraph(error, case, "no LA case id")


# ---------------------------------------------------------------------------------------------------------------------
# the files

IMAGE, LABEL = case_arrays(1)
NAN = np.where(LABEL > 0, np.nan, IMAGE).astype(np.float32)


def truncate(path: Path) -> None:
    """Cut the file in its middle."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), ("there is no",)),
        (truncate, ("no readable HDF5 file",)),
        (lambda p: p.write_bytes(b""), ("no readable HDF5 file",)),
        (lambda p: p.write_text("not h5"), ("no readable HDF5 file",)),
        (lambda p: write_h5(p, image=IMAGE), ("no array 'label'", "it holds image")),
        (lambda p: write_h5(p, label=LABEL), ("no array 'image'", "it holds label")),
        (lambda p: write_h5(p), ("no array 'image'", "it holds nothing")),
        (lambda p: write_h5(p, image=IMAGE, label=LABEL[:, :, :-1]), ("(10, 9, 7)", "(10, 9, 8)")),
        (lambda p: write_h5(p, image=IMAGE[0], label=LABEL[0]), ("shape (9, 8)", "3D")),
        (lambda p: write_h5(p, image=IMAGE[None], label=LABEL[None]), ("shape (1, 10, 9, 8)", "3D")),
        (lambda p: write_h5(p, image=NAN, label=LABEL), ("27 NaN or infinite",)),
        (lambda p: write_h5(p, image=0 * IMAGE, label=LABEL), ("every voxel of the image is 0",)),
        (lambda p: write_h5(p, image=IMAGE, label=LABEL * 2), ("values 0..2", "2 classes")),
        (lambda p: write_h5(p, image=IMAGE, label=-LABEL.astype(np.int16)), ("values -1..0",)),
        (lambda p: write_h5(p, image=IMAGE, label=LABEL * np.float32(0.5)), ("not whole numbers",)),
        (lambda p: write_h5(p, image=IMAGE, label=NAN), ("not whole numbers",)),
        (lambda p: write_h5(p, image=IMAGE + 1j, label=LABEL), ("complex", "not a number")),
    ],
)
def test_wrong_files_name_the_file_and_the_fault(
    tmp_path: Path, damage: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    source = make_root(tmp_path)
    path = tmp_path / FOLDER / "b" / "mri_norm2.h5"
    damage(path)
    with pytest.raises(DataError) as error:
        source.load("b")
    one_paragraph(error, str(path), *words)


@pytest.mark.parametrize("kind", ["float64", ">f4", "int16", "uint16"])
def test_other_number_types_are_read(tmp_path: Path, kind: str) -> None:
    source = make_root(tmp_path)
    image = np.round(IMAGE * 10 + 100).astype(kind)
    write_h5(tmp_path / FOLDER / "b" / "mri_norm2.h5", image=image, label=LABEL.astype(np.float64))
    volume = source.load("b")
    assert np.array_equal(volume.image.numpy(), image.astype(np.float32))
    assert volume.label is not None
    assert np.array_equal(volume.label.numpy(), LABEL)
