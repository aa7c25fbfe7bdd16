"""Scans in, masks out: geometry kept whatever the orientation, models chosen without guessing, masks scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

import cfrbench
from cfrbench.cli import app, data, evaluate, housekeeping, plugins, predict, report, run  # noqa: F401
from cfrbench.errors import CfrbenchError, UsageError
from cfrbench.prediction import choose_cell, open_model, predict_files

nib: Any = nibabel
SMALL = {"data.phantom.train": 3, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=folder)
    return folder


def scan(path: Path, axes: tuple[int, int, int] = (0, 1, 2)) -> Any:
    """An oblique, anisotropic scan with codes, units and scaling set; ``axes`` permutes how it is stored."""
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = (turn @ np.diag([1.5, -1.5, 3.0]))[:, axes]
    affine[:3, 3] = (-20, 30, -40)
    values = np.random.default_rng(0).normal(100, 30, (30, 34, 17)).transpose(axes)
    image = nib.Nifti1Image(values.astype(np.int16), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2.0, 5.0)
    nib.save(image, path)
    return nib.load(path)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_mask_has_the_geometry_of_its_scan(store: Path, tmp_path: Path, axes: tuple[int, int, int]) -> None:
    source = scan(tmp_path / "scan.nii.gz", axes)
    network, bench = open_model(store, "latest", {"ssl": "mt", "labels": 1, "variant": "cfr"})
    (target,) = predict_files(network, bench, tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    mask = nib.load(target)
    assert mask.shape == source.shape
    assert np.array_equal(mask.affine, source.affine)
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert mask.header[field] == source.header[field], field
    assert mask.get_data_dtype() == np.uint8
    assert mask.header.get_slope_inter() in ((1.0, 0.0), (None, None))


def test_the_answer_does_not_depend_on_how_a_scan_is_stored(store: Path, tmp_path: Path) -> None:
    network, bench = open_model(store, "latest", {"ssl": "mt", "labels": 1, "variant": "baseline"})
    answers = []
    for axes in ((0, 1, 2), (2, 0, 1)):
        scan(tmp_path / "scan.nii.gz", axes)
        predict_files(network, bench, tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
        answers.append(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj).transpose(np.argsort(axes)))
    assert np.array_equal(*answers)


def test_several_models_are_never_guessed_between(store: Path) -> None:
    record = json.loads(next((store / "runs").glob("*.json")).read_text()) | {"name": "r"}
    with pytest.raises(UsageError, match=r"matches several models.*--variant cfr"):
        choose_cell(record, {"ssl": "mt"})
    with pytest.raises(UsageError, match="matches no model"):
        choose_cell(record, {"ssl": "acmt"})
    assert choose_cell(record, {"ssl": "mt", "variant": "cfr"})["variant"] == "cfr"


def test_a_folder_is_predicted_and_scored(store: Path, tmp_path: Path) -> None:
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name in ("a", "b"):
        scan(scans / f"{name}.nii.gz")
    chosen = ["--ssl", "supervised", "--labels", "1"]
    done = CliRunner().invoke(app, ["predict", "latest", str(scans), "-o", str(masks), *chosen, "--store", str(store)])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in masks.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    scored = CliRunner().invoke(app, ["evaluate", str(masks), str(masks), "--json"])
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["mean"]["dice"] == 100.0


def test_published_weights_are_scored_by_the_same_protocol(store: Path, tmp_path: Path) -> None:
    weights = next((store / "train").glob("*/weights.safetensors"))
    options = [part for k, v in SMALL.items() for part in ("--set", f"{k}={list(v) if isinstance(v, tuple) else v}")]
    arguments = ["evaluate", "--checkpoint", str(weights), "--preset", "smoke", "--json", *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["rows"]) == 1
    with pytest.raises(CfrbenchError, match="does not fit"):
        CliRunner().invoke(app, [*arguments, "--set", "net.vnet.width=4"], catch_exceptions=False)


def test_a_mask_never_overwrites_its_scan(store: Path, tmp_path: Path) -> None:
    scan(tmp_path / "scan.nii.gz")
    network, bench = open_model(store, "latest", {"ssl": "mt", "labels": 1, "variant": "cfr"})
    with pytest.raises(UsageError, match="overwrite"):
        predict_files(network, bench, tmp_path / "scan.nii.gz", tmp_path)
