"""The public data sets in the layouts in which the field passes them around, on tiny files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cfrbench.config import PRESETS, Settings, override
from cfrbench.errors import DataError
from cfrbench.published import published
from tests.data.la_files import write_h5
from tests.data.public_files import opened, scan, write_lists, write_nifti, write_nrrd, write_task

SETS = ("la", "brats19", "btcv", "mact", "acdc", "hippocampus", "msd")
SPLITS = {"la": (80, 0, 20), "brats19": (250, 25, 60), "btcv": (18, 0, 12), "mact": (70, 0, 20), "acdc": (70, 10, 20)}


# ---------------------------------------------------------------------------------------------------------------------
# facts


@pytest.mark.parametrize("name", SETS)
def test_options_that_were_not_given_are_not_part_of_keys(name: str) -> None:
    defaults = {"seed": 0, "test": 0.2} if name in ("msd", "hippocampus") else {}
    named = {"btcv": {"order": "effective"}, "mact": {"split": "plain"}}.get(name, {})
    assert opened(name).config.model_dump(mode="json") == defaults | named


@pytest.mark.parametrize("name", SPLITS)
def test_shipped_lists_are_whole_and_apart(name: str) -> None:
    lists = opened(name).shipped()
    found = {role: lists[role].read_text().split() if role in lists else [] for role in ("train", "val", "test")}
    assert tuple(len(found[role]) for role in ("train", "val", "test")) == SPLITS[name]
    ids = [case for cases in found.values() for case in cases]
    assert len(set(ids)) == len(ids)


def test_first_labelled_cases_are_the_papers() -> None:
    effective = opened("btcv").shipped()["train"].read_text().split()
    assert effective[:7] == ["0006", "0039", "0021", "0005", "0007", "0031", "0040"]
    in_file = opened("btcv", order="file").shipped()["train"].read_text().split()
    assert in_file[:3] == ["0031", "0007", "0009"]
    # MagicNet shuffles its list with numpy seed 1337: the same order comes out.
    np.random.seed(1337)
    np.random.shuffle(in_file)
    assert in_file == effective
    assert opened("brats19").shipped()["train"].read_text().split()[0] == "BraTS19_TCIA02_370_1"


def test_folds_of_mact_test_each_case_at_most_once() -> None:
    folds = [opened("mact", split=f"magicnet-fold{k}").shipped() for k in (1, 2, 3, 4)]
    tested = [case for fold in folds for case in fold["test"].read_text().split()]
    assert len(tested) == len(set(tested)) == 88
    for fold in folds:
        assert not set(fold["train"].read_text().split()) & set(fold["test"].read_text().split())


@pytest.mark.parametrize(("name", "classes"), [("btcv", 14), ("mact", 9)])
def test_classes_are_the_papers_columns_in_order(name: str, classes: int) -> None:
    table = published()
    columns = table[(table["dataset"] == name) & ~table["class"].isin(("mean", "pseudo-label"))]["class"].unique()
    ours = [organ.replace("oesophagus", "esophagus").replace(" gland", "").replace(" and ", " ").replace(" ", "_")
            for organ in opened(name).class_names[1:]]  # fmt: skip
    assert len(ours) == classes - 1
    assert list(columns) == ours


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [n for n in SPLITS if n != "la"])
def test_protocols_are_settings_with_crops_that_suit_networks(name: str, preset: str) -> None:
    source = opened(name)
    settings = override(Settings(), {**source.protocol(preset)})
    assert all(side % 8 == 0 for side in settings.training.patch)
    assert settings.training.rotflip is (name == "brats19")
    if preset == "paper" and name != "acdc":
        assert settings.training.patch == (96, 96, 96)
        assert settings.inference.stride_xy == settings.inference.stride_z == (64 if name == "brats19" else 12)


def test_brats_trains_the_papers_network_unless_another_is_asked_for(tmp_path: Path) -> None:
    from cfrbench.config import RunConfig
    from cfrbench.recipes import study_of

    for number, case in enumerate(("a", "b", "c")):
        image, label = scan(number)
        write_h5(tmp_path / f"{case}.h5", image=image, label=label)
    write_lists(tmp_path, "a\nb\n", "c\n")
    asked = {"dataset": "brats19", "data_root": tmp_path, "preset": "smoke"}
    assert study_of(RunConfig.model_validate(asked)).config.net == "unet3d"
    assert study_of(RunConfig.model_validate(asked | {"net": "vnet"})).config.net == "vnet"
    assert study_of(RunConfig(preset="smoke")).config.net == "vnet"


# ---------------------------------------------------------------------------------------------------------------------
# community layouts


def test_brats_h5_swaps_axes_and_joins_tumour_parts(tmp_path: Path) -> None:
    image, label = scan(0, classes=5)
    write_h5(tmp_path / "data" / "BraTS19_TCIA02_370_1.h5", image=image.T, label=label.T)  # stored as z, y, x
    write_h5(tmp_path / "data" / "BraTS19_TCIA02_309_1.h5", image=image.T + 1, label=label.T)
    source = opened("brats19", tmp_path)
    split = source.split()
    assert (split.train, split.test) == (("BraTS19_TCIA02_370_1",), ("BraTS19_TCIA02_309_1",))
    assert split.note == "1 of 250 training and 1 of 60 test cases present"
    volume = source.load(split.train[0])
    assert np.array_equal(volume.image.numpy(), image.astype(np.float32))
    assert np.array_equal(volume.label.numpy(), label > 0)


@pytest.mark.parametrize("place", ["btcv_h5/{}.h5", "{}.h5", "case{}.npy.h5", "btcv_h5/case{}.h5"])
def test_btcv_h5_and_its_list_of_endings(tmp_path: Path, place: str) -> None:
    image, label = scan(1, classes=14)
    for case in ("0031", "0007", "0008"):
        write_h5(tmp_path / place.format(case), image=image + int(case), label=label)
    assert opened("btcv", tmp_path).split().note == "2 of 18 training and 1 of 12 test cases present"
    assert opened("btcv", tmp_path).split().train == ("0007", "0031")
    write_lists(tmp_path, "case0031.npy.h5,\ncase0007.npy.h5\n", "case0008.npy.h5\n")
    source = opened("btcv", tmp_path)
    assert source.split().train == ("0031", "0007")
    volume = source.load("0031")
    assert volume.spacing_mm == (1.5, 1.5, 2.0)
    assert np.array_equal(volume.label.numpy(), label)


def test_npy_pairs_load_and_objects_are_refused(tmp_path: Path) -> None:
    image, label = scan(2, classes=9)
    for case in ("0001", "0071"):
        (tmp_path / "npy").mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{case}_image.npy", image + int(case))
        np.save(tmp_path / "npy" / f"{case}_label.npy", label)
    source = opened("mact", tmp_path)
    assert source.split().note == "1 of 70 training and 1 of 20 test cases present"
    assert np.array_equal(source.load("0001").label.numpy(), label)
    assert len(set(source.fingerprint().values())) == 2
    np.save(tmp_path / "npy" / "0001_label.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"0001_label\.npy is no readable"):
        source.load("0001")


def test_acdc_lists_patients_whose_frames_are_numbered_in_any_way(tmp_path: Path) -> None:
    image, label = scan(3, (6, 24, 20), classes=4)  # slices first
    for number, name in enumerate(("041_frame01", "041_frame11", "080_frame02", "028_frame01")):
        write_h5(tmp_path / "ACDC_training_volumes" / f"patient{name}.h5", image=image + number, label=label)
    source = opened("acdc", tmp_path)
    split = source.split()
    assert split.train == ("patient041_frame01", "patient041_frame11")
    assert (split.val, split.test) == (("patient028_frame01",), ("patient080_frame02",))
    assert split.note == "1 of 70 training and 1 of 20 test patients present"
    assert source.load(split.train[0]).shape == (24, 20, 6)
    write_lists(tmp_path, "patient080_frame01_slice_3\npatient080_frame01_slice_1\n", "patient041_frame02\n")
    assert opened("acdc", tmp_path).split().train == ("patient080_frame02",)


# ---------------------------------------------------------------------------------------------------------------------
# the Decathlon


def test_a_task_is_what_its_file_says(tmp_path: Path) -> None:
    source = opened("msd", write_task(tmp_path))
    assert source.class_names == ("background", "spleen", "cyst")
    assert source.title == "Spleens"
    split = source.split()
    assert (len(split.train), len(split.test)) == (4, 1)
    image, label = scan(0, classes=3)
    volume = source.load("spleen_00")
    assert np.array_equal(volume.image.numpy(), image.astype(np.float32))
    assert np.array_equal(volume.label.numpy(), label)
    assert volume.spacing_mm == (1, 1, 2)
    # The classes are in the options, so a trained network is used where the files are not.
    again = opened("msd", **source.config.model_dump(mode="json"))
    assert again.class_names == source.class_names
    override(Settings(), {**source.protocol("quick")})


def test_a_task_with_channels_needs_one_chosen(tmp_path: Path) -> None:
    write_task(tmp_path, channels=2)
    with pytest.raises(DataError, match="--channel 0 to 1"):
        opened("msd", tmp_path).load("spleen_00")
    assert np.array_equal(opened("msd", tmp_path, channel=1).load("spleen_00").image.numpy(), scan(0, classes=3)[0] + 7)


def test_a_folder_that_is_no_task_is_sent_to_import(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match="cfrbench data import"):
        opened("msd", tmp_path)


@pytest.mark.parametrize("with_file", [True, False])
def test_hippocampus_with_and_without_its_file(tmp_path: Path, with_file: bool) -> None:
    if with_file:
        write_task(tmp_path)
    else:
        for number, name in enumerate(("001", "008", "010", "118")):
            image, label = scan(number, classes=3)
            write_nifti(tmp_path / "images" / f"hippocampus_{name}.nii.gz", image)
            if name != "118":
                write_nifti(tmp_path / "labels" / f"hippocampus_{name}.nii.gz", label)
    source = opened("hippocampus", tmp_path)
    assert source.class_names == ("background", "anterior", "posterior")
    cases = {*source.split().train, *source.split().test}
    assert len(cases) == (5 if with_file else 2)
    assert all(torch.equal(torch.unique(source.load(case).label), torch.arange(3, dtype=torch.uint8)) for case in cases)


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong


@pytest.mark.parametrize("name", SETS)
def test_without_a_folder_every_set_says_where_to_get_it(name: str) -> None:
    with pytest.raises(DataError, match="--data-root") as error:
        opened(name).split()
    assert "\n" not in str(error.value)
    assert opened(name).origin in str(error.value)


def test_an_h5_file_neither_leads_elsewhere_nor_unpacks_without_end(tmp_path: Path) -> None:
    image, label = scan(0, classes=14)
    write_h5(tmp_path / "0008.h5", image=image, label=label)
    with h5py.File(tmp_path / "0031.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(tmp_path / "0008.h5"), "image")
        file["label"] = label
    with h5py.File(tmp_path / "0007.h5", "w") as file:
        file.create_dataset("image", (4000, 4000, 4000), np.float32, chunks=(100, 100, 100))
        file["label"] = label
    source = opened("btcv", tmp_path)
    with pytest.raises(DataError, match=r"0031\.h5: the member 'image' lies in another file"):
        source.load("0031")
    with pytest.raises(DataError, match=r"0007\.h5 announces"):
        source.load("0007")


def test_raw_files_are_not_taken_for_prepared_ones(tmp_path: Path) -> None:
    write_nrrd(tmp_path / "A" / "lgemri.nrrd", scan(0)[0])
    with pytest.raises(DataError, match="cfrbench data prepare la --raw"):
        opened("la", tmp_path).split()


def test_a_list_line_without_an_id(tmp_path: Path) -> None:
    image, label = scan(0, classes=14)
    write_h5(tmp_path / "0031.h5", image=image, label=label)
    write_lists(tmp_path, "case0031\nspleen\n", "0008\n")
    with pytest.raises(DataError, match="'spleen', in which no BTCV id is found"):
        opened("btcv", tmp_path).split()


def test_load_names_file_and_fault(tmp_path: Path) -> None:
    image, label = scan(0, classes=14)
    write_h5(tmp_path / "0031.h5", image=image, label=label + 9)
    source = opened("btcv", tmp_path)
    with pytest.raises(DataError, match=r"0031\.h5.*values 9\.\.22"):
        source.load("0031")
    with pytest.raises(DataError, match=r"there is no .*0007\.h5"):
        source.load("0007")
    with pytest.raises(DataError, match="no BTCV case id"):
        source.load("../0031")
