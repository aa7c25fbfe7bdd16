"""The page of a run: complete, self-contained, of a bearable size, and honest about what is missing."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cfrbench.cli import app, report  # noqa: F401
from cfrbench.config import Triple
from cfrbench.formats import read_labels
from cfrbench.pages import observatory, viewer
from cfrbench.pages.material import Material, best_median_worst, dice_by_case
from cfrbench.pages.observatory import Seen
from cfrbench.pages.writing import write_page
from tests.pages.runs import SMALL, small_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    small_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with pictures instead of the viewer, and without new labels of test cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "PACKAGE", "no_such_package")
        folder = tmp_path_factory.mktemp("page") / "of" / "a run"
        done = CliRunner().invoke(app, ["report", "latest", "--format", "html", "-o", str(folder), "--no-pseudo",
                                        "--store", str(store)])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "0 volumes" in done.stdout
    return folder / "index.html"


def test_without_the_extra_there_is_a_picture_of_each_test_case_instead_and_the_page_says_so(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    montages = text[text.index('<section id="montages">') : text.index('<section id="cases">')]
    assert montages.count("<img ") == SMALL["data.phantom.test"]
    assert "install cfrbench[viewer]" in text
    assert 'id="viewer"' not in text
    assert len(text) < 15e6


def test_everything_that_the_run_is_stands_on_the_page(page: Path, store: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    record = json.loads(next((store / "runs").glob("*.json")).read_text())
    for words in (record["name"], *record["facts"]["protocol"].split("; "), "Phantom: synthetic volumes, not patients",
                  'dataset = "phantom"', "Pseudo-label observatory", "torch"):  # fmt: skip
        assert words in text
    scored = sum(len(cell["keys"]) > 0 for cell in record["cells"])
    rows = re.search(r"Every score.*?<tbody>(.*?)</tbody>", text, flags=re.DOTALL)
    assert rows is not None
    tested, labelled = SMALL["data.phantom.test"], SMALL["data.phantom.train"] - 1  # type: ignore[operator]
    assert rows[1].count("<tr>") == (scored - 1) * tested + labelled
    for key in {key for cell in record["cells"] for key in cell["keys"]}:
        if any((store / stage / key).is_dir() for stage in ("tune", "pseudo", "train", "predict", "score")):
            assert key[:12] in text
    assert len(pd.read_csv(page.with_name("cases.csv"))) == 4 * rows[1].count("<tr>")


def test_nothing_on_the_page_leads_away_from_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert addresses
    assert all(address.startswith(("data:", "#")) or address == "cases.csv" for address in addresses)
    assert "http://" not in text
    assert "https://" not in text


def test_a_page_without_its_data_still_has_every_number(store: Path, tmp_path: Path) -> None:
    record = next((store / "runs").glob("*.json"))
    values = json.loads(record.read_text())
    values["config"]["dataset"], values["name"] = "la", "moved"
    values["cells"][0]["score"] = "0" * 64
    values["written"] = "2000-01-01T00:00:00+00:00"
    moved = store / "runs" / "moved.json"
    moved.write_text(json.dumps(values))
    try:
        done = write_page("moved", store, tmp_path)
    finally:
        moved.unlink()
    assert [note for note in done.notes if "Not finished" in note]
    assert [note for note in done.notes if "data set could not be read" in note]
    text = done.path.read_text(encoding="utf-8")
    assert "Every score" in text
    assert 'id="gains"' not in text


def test_what_a_run_is_called_cannot_become_markup(store: Path, tmp_path: Path) -> None:
    record = next((store / "runs").glob("*.json"))
    values = json.loads(record.read_text())
    evil = "<script>alert(1)</script>"
    values["facts"] |= {"title": evil, "split": evil, "model_note": evil, "protocol": evil}
    values |= {"name": "evil", "failures": {evil: evil}, "written": "2000-01-01T00:00:00+00:00"}
    path = store / "runs" / "evil.json"
    path.write_text(json.dumps(values))
    try:
        done = write_page("evil", store, tmp_path, label_tests=False)
    finally:
        path.unlink()
    assert evil not in done.path.read_text(encoding="utf-8")


def test_the_volumes_of_a_page_are_those_of_the_store(store: Path) -> None:
    material = Material.of("latest", store)
    groups = material.groups(label_tests=False, say=lambda _: None)
    payload = json.loads(viewer.case_payload(material, groups, "test-01"))

    def volume(text: str) -> nibabel.Nifti1Image:
        return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))

    assert np.array_equal(np.asarray(volume(payload["truth"]).dataobj), material.truth("test-01"))
    for one in material.cells:
        if one.record.stage == "predict":
            assert one.masks is not None
            stored = read_labels(one.masks.path("labels.npz"))["test-01"].numpy()
            shown = volume(payload["masks"][one.record.name])
            assert np.array_equal(np.asarray(shown.dataobj), stored)
            assert shown.header.get_zooms() == pytest.approx(material.volume("test-01").spacing_mm)
            assert nibabel.aff2axcodes(shown.affine) == tuple("RAS")
    assert np.asarray(volume(payload["image"]).dataobj).dtype == np.uint8


def test_greys_keep_the_order_of_intensities() -> None:
    image = np.linspace(-3.0, 5.0, 1000).reshape(10, 10, 10)
    shown = viewer.grey(image).ravel()
    assert (shown.min(), shown.max()) == (0, 255)
    assert (np.diff(shown.astype(int)) >= 0).all()


def test_niivue_is_found_in_the_bundle_and_cannot_end_the_page() -> None:
    pytest.importorskip("ipyniivue", reason="the extra `viewer` is not installed")
    found = viewer.niivue_script()
    assert found is not None
    script, words = found
    assert re.search(r";window\.Niivue = [\w$]+;\s*$", script)
    assert "</script" not in script.lower()
    assert words.startswith("NiiVue")


@pytest.mark.parametrize(
    ("bundle", "name"),
    [
        ("var a=class{x(){}};var t2=class extends E{constructor(){} async attachToCanvas(A){}}", "t2"),
        ("class Nv extends Base { async attachToCanvas(A){} } class Later {}", "Nv"),
        ("class Nv { x(){} }", None),
    ],
)
def test_the_class_is_the_one_around_the_method(bundle: str, name: str | None) -> None:
    assert viewer._class_around(bundle, "async attachToCanvas(") == (name if "attach" in bundle else None)


def test_cases_are_chosen_by_rule() -> None:
    assert best_median_worst({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0}) == {"d": "best", "c": "median", "b": "worst"}
    assert best_median_worst({"a": 3.0}) == {"a": "best"}
    assert best_median_worst({}) == {}


def test_dice_of_hand_made_masks() -> None:
    shape: Triple = (2, 2, 2)
    truth = np.zeros(shape, np.uint8)
    truth[0], mask = 1, np.zeros(shape, np.uint8)
    mask[0, 0] = 1
    assert dice_by_case({"a": truth}, {"a": mask}) == {"a": pytest.approx(100 * 2 * 2 / (4 + 2))}


def test_the_observatory_says_what_drifted_and_what_collapsed() -> None:
    def seen(case: str, name: str, dice: float, truth_ml: float, pseudo_ml: float, empty: str = "") -> Seen:
        return Seen(1, 0, "tiny + lora", case, name, dice, truth_ml, pseudo_ml, empty)

    rows = [seen("a", "organ", 80, 10, 11), seen("b", "organ", 50, 10, 20), seen("a", "duct", 0, 2, 0, "prediction"),
            seen("b", "duct", 0, 2, 0, "prediction"), seen("c", "organ", 0, 0, 3, "truth")]  # fmt: skip
    by_case = {(row[0], row[1]): row for row in observatory.by_case(rows).rows}
    assert by_case["a", "organ"][-2:] == ("+10.0", "")
    assert by_case["b", "organ"][-2:] == ("+100.0", "too large")
    assert by_case["a", "duct"][-2:] == ("-100.0", "collapsed")
    assert by_case["c", "organ"][-1] == "invented"
    organ, duct = observatory.by_class(rows).rows
    assert organ[-2:] == ("0 of 2", "found")
    assert duct[-2:] == ("2 of 2", "collapsed")
    assert organ[-4:-2] == ("+55.0", "55.00")


def test_drift_is_measured_against_the_truth_of_the_data_set(store: Path) -> None:
    material = Material.of("latest", store)
    for one in observatory.observe(material):
        voxel_ml = np.prod(material.volume(one.case).spacing_mm) / 1000
        assert one.truth_ml == pytest.approx((material.truth(one.case) == 1).sum() * voxel_ml)
        assert one.collapsed == (one.pseudo_ml == 0)
