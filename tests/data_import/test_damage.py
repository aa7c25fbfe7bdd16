"""The table of docs/damage.md is the test: each damage is done, and the message must name the file and the reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.data_import import damages, sound_files
from tests.data_import.damages import DAMAGES, Damage, told

DOCS = Path(__file__).parents[2] / "docs" / "damage.md"
ALL = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Synthetic sound files for each kind of data."""
    return {
        where: sound_files.sound(where, tmp_path_factory.mktemp(where)) for where in ("import", "check", "prepared")
    }


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> dict[str, Path]:
    """The same from real files, under the same names."""
    home = tmp_path_factory.mktemp("real")
    for number, path in enumerate(sorted((data_folder / "hippocampus/images").iterdir())[:4]):
        for part in ("images", "labels"):
            (home / "nifti" / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(data_folder / "hippocampus" / part / path.name, home / "nifti" / part / f"case {number}.nii.gz")
    cases = sorted((data_folder / "la" / "2018LA_Seg_Training Set").iterdir())
    for case, source in zip("abc", cases, strict=False):
        (home / "h5" / case).mkdir(parents=True)
        shutil.copy(source / "mri_norm2.h5", home / "h5" / sound_files.H5.format(case))
    prepared = sound_files.prepared_folder(home / "prepared", home / "nifti")
    return {"import": home / "nifti", "check": sound_files.with_lists(home / "h5"), "prepared": prepared}


def masked(text: str) -> str:
    """Without numbers, which depend on the version of the library that compressed a file."""
    return re.sub(r"[\d.]+", "0", text)


@ALL
def test_what_is_said_names_the_file_and_the_reason(damage: Damage, sound: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(sound[damage.where], folder)
    said = told(damage, folder)
    assert [part for part in damage.says if part not in said] == []
    assert "\n" not in said
    line = damages.row(damage, said, tmp_path)
    assert masked(line) in masked(DOCS.read_text(encoding="utf-8")), (
        "python -m tests.data_import.damages prints the table"
    )


@pytest.mark.realdata
@ALL
def test_the_same_is_said_of_real_files(damage: Damage, real: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(real[damage.where], folder)
    said = told(damage, folder)
    assert [part for part in damage.says if part not in said] == []


@pytest.mark.parametrize("where", ["import", "check", "prepared"])
def test_sound_files_are_not_accused(where: str, sound: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(sound[where], folder)
    assert told(Damage(where, "nothing", lambda home: None, ()), folder) == ""


def test_the_page_has_a_row_for_each_damage_and_no_other() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and " | " in line]
    assert len(rows) == len(DAMAGES) + 3  # and a head in each of the three tables
    assert len(DAMAGES) >= 25
