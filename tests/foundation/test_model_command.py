"""`cfrbench model`: what is there, what is known of it, how files get here, how many parameters there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from cfrbench import registry, weights
from cfrbench.cli import app, model  # noqa: F401 - it registers
from cfrbench.errors import UsageError, WeightsError


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["model", *arguments])


def answer(*arguments: str) -> Any:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CFRBENCH_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_list_names_every_model_and_says_whether_it_is_here(folder: Path) -> None:
    rows = {row["name"]: row for row in answer("list")}
    assert sorted(rows) == registry.names("model")
    states = {name: row["weights"] for name, row in rows.items()}
    assert states["lite-medsam"] == "here"
    assert states["tiny"] == "none needed"
    assert states["medsam"] == "missing"
    folder.mkdir()
    (folder / "medsam_vit_b.pth").write_bytes(b"")
    assert {row["name"]: row["weights"] for row in answer("list")}["medsam"] == "here"
    assert all(row["licence"] and row["encoder"] for row in rows.values())
    assert "SAM-Med2D" in invoke("list").output


@pytest.mark.parametrize("name", registry.names("model"))
def test_info_says_what_there_is_to_know(name: str, folder: Path) -> None:
    about = answer("info", name)
    assert about["parameters"] > 1000
    assert about["sees"].endswith((".", "returned"))
    assert about["input_sizes"].startswith("multiples of ")
    assert about["origin"]
    if name == "sam-vit-b":
        assert about["file"] == str(folder / "sam_vit_b_01ec64.pth")
        assert about["sha256"] == weights.RELEASED["SAM ViT-B"]
    if name == "lite-medsam":
        assert "contaminated" in about["note"]


def test_info_is_text_by_default() -> None:
    assert "parameters    93,735,472" in invoke("info", "sam-vit-b").output


def test_an_unknown_model_is_named_with_what_is_near() -> None:
    with pytest.raises(Exception, match="Did you mean 'medsam'"):
        CliRunner().invoke(app, ["model", "info", "medsan"], catch_exceptions=False)


def test_get_from_a_file_checks_copies_and_shows_the_digest(folder: Path, tmp_path: Path) -> None:
    packaged = registry.load("model", "lite-medsam").home()
    done = invoke("get", "lite-medsam", "--from", str(packaged), "--to", str(tmp_path / "here"))
    assert done.exit_code == 0, done.output
    words = done.output.replace("\n", "")
    assert str(tmp_path / "here" / "lite_medsam.pth") in words
    assert weights.RELEASED["LiteMedSAM"] in words
    assert "--set model.lite-medsam.checkpoint=" in words
    assert (tmp_path / "here" / "lite_medsam.pth").read_bytes() == packaged.read_bytes()


def refused(*arguments: str) -> str:
    with pytest.raises((WeightsError, UsageError)) as caught:
        CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)
    return str(caught.value)


def test_get_refuses_another_file_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pth"
    torch.save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(32, 3, 1, 1)}, wrong)
    assert "is LiteMedSAM, but MobileSAM was asked for" in refused("get", "mobile-sam", "--from", str(wrong))
    assert "is damaged or another file" in refused("get", "lite-medsam", "--from", str(wrong))
    assert "is LiteMedSAM, but SAM ViT-B was asked for" in refused("get", "medsam", "--from", str(wrong))
    wrong.write_bytes(wrong.read_bytes()[:200])
    for name in ("medsam", "lite-medsam"):  # without and with a published digest
        assert "cut off after 200 bytes" in refused("get", name, "--from", str(wrong))
    assert "no checkpoint at" in refused("get", "medsam", "--from", str(tmp_path / "none.pth"))
    assert not folder.exists()


def test_get_without_a_file_or_an_address_says_what_to_do(folder: Path) -> None:
    assert "model get sam-med2d --from FILE" in refused("get", "sam-med2d")
    assert "'tiny' has no checkpoint to get" in refused("get", "tiny")


def test_get_finds_what_the_package_brings() -> None:
    done = invoke("get", "lite-medsam")
    assert done.exit_code == 0
    assert weights.RELEASED["LiteMedSAM"] in done.output


def test_params_prints_whole_numbers_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    output = invoke("params", "--tune", "lora", "--classes", "2").output
    assert all(number in output for number in ("93,602,286", "3,931,374", "3,793,312"))


def test_params_as_json_and_for_another_model() -> None:
    (row,) = answer("params", "--tune", "decoder-only", "--model", "lite-medsam", "--classes", "4")
    assert row["total"] == 9_791_300
    output = invoke("params", "--tune", "samus", "--model", "lite-medsam").output
    assert "samus does not fit" in output


def test_the_page_of_models_says_what_the_plug_ins_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert sorted(rows) == registry.names("model")
    sizes = {line.split("`")[1]: line for line in reversed(page.splitlines()) if line.startswith("| `")}
    for name in registry.names("model"):
        about = answer("info", name)
        assert f"| {about['parameters']:,} | {about['input_size']} |" in sizes[name]
        if len(about.get("sha256", "")) == 64:
            assert about["sha256"] in rows[name]
        if "file" in about:
            assert Path(about["file"]).name in rows[name]
