"""`cfrbench reproduce` on tiny volumes: the missing shows as missing, the finished is drawn again byte for byte."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cfrbench import registry
from cfrbench.cli import app, reproduce  # noqa: F401 - it registers
from cfrbench.cli.common import parse_replacements
from cfrbench.errors import ConfigError, UsageError
from cfrbench.exhibits import forecasts, planning, recipe, running
from cfrbench.exhibits.planning import Overrides
from cfrbench.exhibits.showing import ENDINGS
from cfrbench.report import writers
from tests.exhibits.conftest import forget
from tests.guests import METHOD, install

SMALL = {"data.phantom.train": 3, "data.phantom.test": 2, "data.phantom.shape": [16, 16, 16]}
OPTIONS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
TINY = """
title = "Tiny"
about = "MT and a method that nobody has, with one label and with more than there are."
notes = ["A note of the recipe."]
[[experiment]]
dataset = "heart"
labels = ["scarce", 9]
paper_labels = [2, 9]
methods = ["nobodys-method", "mt"]
guided = ["mt"]
tuned = true
bounds = ["lower"]
[[table]]
kind = "comparison"
metrics = ["dice", "hd95"]
[[table]]
kind = "gains"
[[table]]
kind = "paper"
[[table]]
kind = "costs"
[[table]]
kind = "stages"
[[figure]]
kind = "methods"
[[figure]]
kind = "budgets"
[[figure]]
kind = "quality"
[[figure]]
kind = "curves"
[[figure]]
kind = "ranks"
[[figure]]
kind = "predictions"
[[figure]]
kind = "pseudo"
"""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["reproduce", *arguments])


def tiny(home: Path, *more: str) -> Any:
    """The recipe above on the phantom, in the store of the fixture."""
    return call("tiny", "--dataset", "phantom", "--preset", "smoke", *OPTIONS, "--store", str(home / "store"), "-o",
                str(home / "out"), *more)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipe installed, and a store and an output folder in which it has been made once."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        install(folder, "dist-tiny", {"recipe.tiny": ("guest_tiny", "")})
        (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
        patch.syspath_prepend(folder)
        forget()
        done = tiny(folder)
        assert done.exit_code == 0, done.output
        yield folder
    forget()


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table written as CSV."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(io.StringIO("\n".join(lines))))


# ---------------------------------------------------------------------------------------------------------------------
# what is made


@pytest.mark.slow
def test_tables_come_in_every_format_and_figures_as_png_and_pdf(home: Path) -> None:
    out = home / "out" / "tiny"
    assert set(ENDINGS) == set(writers.FORMATS)
    for ending in ENDINGS.values():
        assert (out / f"tiny{ending}").stat().st_size > 200
        for kind in ("gains", "costs", "stages"):
            assert (out / f"tiny-{kind}{ending}").stat().st_size > 200
        assert not (out / f"tiny-paper{ending}").exists(), "the paper has no phantom"
    for kind in ("methods", "budgets", "quality", "curves", "ranks", "predictions", "pseudo"):
        assert (out / f"tiny-{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"tiny-{kind}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_missing_cell_is_missing_and_never_zero(home: Path) -> None:
    found = rows(home / "out" / "tiny" / "tiny.csv")
    names = [(row["Method"], row["Lab./unlab."]) for row in found]
    assert names[:8] == [("V-Net, lower bound", "1/0"), ("V-Net, lower bound", "9/?"), ("nobodys-method", "1/2"),
                         ("nobodys-method", "9/?"), ("MT", "1/2"), ("MT + CFR", "1/2"), ("MT", "9/?"),
                         ("MT + CFR", "9/?")]  # fmt: skip
    empty = [row["Method"] for row in found if row["Dice (%)"] == ""]
    assert empty.count("nobodys-method") == 2
    assert all((row["Dice (%)"] == "") == ("9/?" in row["Lab./unlab."] or row["Method"] == "nobodys-method")
               for row in found)  # fmt: skip
    notes = (home / "out" / "tiny" / "tiny.md").read_text(encoding="utf-8")
    assert "No SSL method called 'nobodys-method'" in notes
    assert "9 labelled cases were asked for" in notes
    assert "Budget 'scarce': 1 labelled cases here, 2 in the paper." in notes
    assert "A note of the recipe." in notes
    assert "95HD" in found[0].keys().__str__()
    assert "Jaccard (%)" not in found[0]


@pytest.mark.slow
def test_the_table_of_stages_compares_on_the_same_cases(home: Path) -> None:
    tuned, guided, *_ = rows(home / "out" / "tiny" / "tiny-stages.csv")
    assert tuned["Budget, model"] == "scarce, fine-tuned"
    assert guided["Budget, model"] == "scarce, MT + CFR"
    assert float(tuned["Params (M)"]) > 0
    gain = float(guided["Phantom"].split("(")[1].rstrip(")"))
    shown = "0" if guided["Phantom"].startswith("0*") else guided["Phantom"].split()[0]
    assert float(shown) - float(tuned["Phantom"].rstrip("*")) == pytest.approx(gain, abs=0.011)


@pytest.mark.slow
def test_given_again_it_trains_nothing_and_writes_the_same_bytes(home: Path) -> None:
    out = home / "out" / "tiny"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    again = tiny(home, "--json")
    assert again.exit_code == 0, again.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (answer,) = json.loads(again.stdout)["exhibits"]
    assert sorted(Path(file).name for file in answer["files"]) == sorted(before)
    assert any("nobodys-method" in reason for reason in answer["missing"])


@pytest.mark.slow
def test_a_half_finished_run_is_shown_as_far_as_it_is(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "predict")
    shutil.rmtree(tmp_path / "store" / "score")
    (tmp_path / "store" / "score").mkdir()
    kept = next(p for p in (home / "store" / "score").iterdir()
                if "V-Net" in (p / "manifest.json").read_text(encoding="utf-8"))  # fmt: skip
    shutil.copytree(kept, tmp_path / "store" / "score" / kept.name)
    shown = tiny(tmp_path, "--no-run")
    assert shown.exit_code == 0, shown.output
    found = {row["Method"]: row["Dice (%)"] for row in rows(tmp_path / "out" / "tiny" / "tiny.csv")
             if row["Lab./unlab."].startswith("1/")}  # fmt: skip
    assert found["V-Net, lower bound"] != ""
    assert found["MT"] == found["MT + CFR"] == ""
    text = (tmp_path / "out" / "tiny" / "tiny.md").read_text(encoding="utf-8")
    assert "Unfinished: 4 of 5 cells are not computed yet." in text
    about = json.loads((tmp_path / "out" / "tiny" / "about.json").read_text(encoding="utf-8"))
    assert about["runs"][0]["finished"] == 1
    assert "tiny-predictions" in about["not_drawn"]
    assert not (tmp_path / "store" / "predict").exists()


# ---------------------------------------------------------------------------------------------------------------------
# forecasts


@pytest.mark.slow
def test_a_dry_run_of_something_finished_costs_nothing(home: Path) -> None:
    shown = tiny(home, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("finished       ") == 5
    (row,) = json.loads(tiny(home, "--dry-run", "--json").stdout)["exhibits"]
    assert (row["stages"], row["work_seconds"], row["unknown"]) == (0, 0, 0)


@pytest.mark.slow
def test_time_and_memory_are_learned_from_the_same_work_under_another_seed(home: Path) -> None:
    asked = Overrides({"": "phantom"}, {}, "smoke", None, (7,), SMALL)
    exhibit = planning.prepare("tiny", recipe.load("tiny"), asked, home / "store")
    (outlook,) = forecasts.outlooks([exhibit], home / "store", jobs=1, probing=False)
    stages = [a.manifest for a in _finished(home)]
    took = sum(m["seconds"] for m in stages if "test cases" not in m["title"] or m["stage"] == "score")
    assert outlook.cost.unknown == 0
    assert outlook.cost.sources == ("the same work",)
    assert outlook.cost.work_seconds == pytest.approx(outlook.cost.wall_seconds)
    assert 0.2 * took < outlook.cost.work_seconds < 5 * took
    assert outlook.cost.peak_mib in {m["peak_mib"] for m in stages}
    assert outlook.finished == 0


def _finished(home: Path) -> list[Any]:
    from cfrbench.store import Store

    store = Store(home / "store")
    found = [
        store.find(path.parent.parent.name, path.parent.name) for path in (home / "store").glob("*/*/manifest.json")
    ]
    return [artifact for artifact in found if artifact is not None]


# ---------------------------------------------------------------------------------------------------------------------
# plans


def test_data_that_are_missing_name_what_can_stand_in(tmp_path: Path) -> None:
    refused = call("table-2", "--store", str(tmp_path))
    assert isinstance(refused.exception, UsageError)
    assert "brats19" in str(refused.exception)
    assert "--dataset phantom" in str(refused.exception)


@pytest.mark.slow
def test_one_missing_data_set_of_several_is_a_column_of_dashes(home: Path, tmp_path: Path) -> None:
    asked = Overrides({"la": "phantom", "brats19": "phantom"}, {}, "smoke", None, None, SMALL)
    exhibit = planning.prepare("table-9", recipe.load("table-9"), asked, tmp_path)
    assert [part.plan is not None for part in exhibit.parts] == [True, True, False, False]
    assert any("btcv" in reason for reason in exhibit.missing)
    from cfrbench.exhibits import tables

    found = tables.all_tables(exhibit, running.finish(exhibit, compute=False))["table-9"]
    assert found.columns[2:] == ("Phantom", "Phantom, unet3d", "btcv", "btcv, paper", "mact", "mact, paper")
    assert found.rows[0][4:6] == ("–", "65.26")
    assert found.rows[2][0] == "moderate, ACMT or MagicNet + CFR"


def test_two_data_sets_replaced_by_one_are_one_experiment(tmp_path: Path) -> None:
    asked = Overrides({"": "phantom"}, {}, "smoke", ("scarce",), None, SMALL)
    exhibit = planning.prepare("figure-7", recipe.load("figure-7"), asked, tmp_path)
    assert len(exhibit.parts) == 1


def test_all_goes_on_without_what_cannot_be_made(tmp_path: Path) -> None:
    exhibits, refused = planning.prepare_all(
        ["all"], Overrides({"la": "phantom"}, {}, "smoke", None, None, SMALL), tmp_path
    )
    assert {"table-3", "figure-12"} <= {exhibit.name for exhibit in exhibits}
    assert {"table-2", "table-5"} <= set(refused), "data that are not there"
    assert "table-1" in refused, "more labels than these few cases"
    assert set(recipe.names()) == {exhibit.name for exhibit in exhibits} | set(refused)


def test_replacements_are_for_one_name_or_for_the_rest() -> None:
    assert parse_replacements(["phantom", "btcv=organs"]) == {"": "phantom", "btcv": "organs"}
    asked = Overrides(parse_replacements(["phantom", "btcv=organs"]))
    assert [asked.dataset(name) for name in ("la", "btcv")] == ["phantom", "organs"]
    for wrong in (["a", "b"], ["la="], [""]):
        with pytest.raises(ConfigError):
            parse_replacements(wrong)


def test_budgets_that_the_data_do_not_have_are_an_error_before_anything_runs(tmp_path: Path) -> None:
    asked = Overrides({"": "phantom"}, {}, "smoke", (30, 40), None, SMALL)
    with pytest.raises(UsageError, match="30 labelled cases were asked for"):
        planning.prepare("table-5", recipe.load("table-5"), asked, tmp_path)


def test_a_missing_first_budget_does_not_shift_the_second(tmp_path: Path) -> None:
    asked = Overrides({"": "phantom"}, {}, "smoke", (30, 1), None, SMALL)
    part, *_ = planning.prepare("table-9", recipe.load("table-9"), asked, tmp_path).parts
    assert part.budgets == (None, 1)
    assert part.config.labels == (1,)
    (words,) = part.missing
    assert words.startswith("MT + CFR (30), ACMT + CFR (30), tiny")
    assert words.count("30 labelled cases were asked for") == 1


@pytest.mark.slow
def test_a_failed_cell_is_missing_with_its_reason_and_the_rest_is_shown(home: Path, tmp_path: Path) -> None:
    text = TINY.replace('["nobodys-method", "mt"]', '["broken-inside"]').replace('guided = ["mt"]\ntuned = true', "")
    plugins = {"ssl.broken-inside": ("guest_failing", METHOD.format(name="broken-inside", title="B")),
               "recipe.failing": ("guest_failing_recipe", "")}  # fmt: skip
    install(home, "dist-failing", plugins)
    (home / "failing.toml").write_text(text.partition('[[table]]\nkind = "gains"')[0], encoding="utf-8")
    forget()
    done = call("failing", "--dataset", "phantom", "--preset", "smoke", *OPTIONS, "--store", str(home / "store"), "-o",
                str(tmp_path), "--json")  # fmt: skip
    assert done.exit_code == 1
    (answer,) = json.loads(done.stdout)["exhibits"]
    assert all("train B" in title and "failed with" in reason for title, reason in answer["failed"].items())
    assert answer["failed"]
    found = {row["Method"]: row["Dice (%)"] for row in rows(tmp_path / "failing" / "failing.csv")
             if row["Lab./unlab."].startswith("1/")}  # fmt: skip
    assert found["B"] == ""
    assert found["V-Net, lower bound"] != ""
    assert "Failed: train B" in (tmp_path / "failing" / "failing.md").read_text(encoding="utf-8")


def test_one_budget_is_enough_for_an_ablation(tmp_path: Path) -> None:
    asked = Overrides({"": "phantom"}, {}, "smoke", (1, 2), None, SMALL)
    with pytest.raises(UsageError, match="--labels takes one number"):
        planning.prepare("figure-4", recipe.load("figure-4"), asked, tmp_path)


def test_reproduce_is_a_kind_of_its_own_among_plug_ins() -> None:
    assert registry.find("recipe", "table-1").distribution == "cfrbench"
