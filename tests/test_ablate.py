"""Ablations on tiny volumes: one plan for all variants, tables that say what they cost, pictures, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cfrbench
from cfrbench import ablation, registry, sweep
from cfrbench.cli import ablate, app, concat, housekeeping, report, run  # noqa: F401 - they register
from cfrbench.config import RunConfig, Settings
from cfrbench.errors import CfrbenchError, ConfigError, PluginError, UsageError
from cfrbench.exhibition import middle
from cfrbench.gauges import Laps
from cfrbench.layouts import contents, slices_per_step, spread, tiles
from cfrbench.report import ablations, charts
from cfrbench.report.writers import to_csv
from cfrbench.store import Store

SMALL = {"data.phantom.train": 4, "data.phantom.test": 1, "data.phantom.shape": (16, 16, 16)}
BASE = RunConfig(preset="smoke", set=SMALL)
OPTIONS = [part for key, value in SMALL.items()
           for part in ("--set", f"{key}={list(value) if isinstance(value, tuple) else value}")]  # fmt: skip
NAMES = ("grid", "scaled:n=2", "scaled:n=9")


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def plan_of(kind: ablation.Kind, folder: Path, base: RunConfig = BASE, **fields: Any) -> ablation.AblationPlan:
    return ablation.plan(ablation.request_of(kind, base, **fields), folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that holds one finished ablation of strategies, and what it wrote."""
    folder = tmp_path_factory.mktemp("ablation")
    done = command(folder)
    assert done.exit_code == 0, done.output
    return folder


def command(folder: Path, *more: str) -> Any:
    """The ablation of the fixture; the last of its strategies cannot be."""
    return call("ablate", "concat", "--preset", "smoke", "--strategies", ",".join(NAMES), "--cases", "2", "--seeds",
                "2", *OPTIONS, "--store", str(folder / "store"), "-o", str(folder / "shown"), *more)  # fmt: skip


@pytest.fixture(scope="module")
def answer(home: Path) -> dict[str, Any]:
    """What the same command says to a machine when it is given again, one of its pictures having been removed."""
    (home / "shown" / "dice.png").unlink()
    found: dict[str, Any] = json.loads(command(home, "--json").stdout)
    return found


def test_the_second_call_trains_nothing_and_draws_again(home: Path, answer: dict[str, Any]) -> None:
    assert answer["stages"] == {"trained": 0, "reused": 2 * 2}
    assert [row["label"] for row in answer["rows"]] == ["grid", "scaled (n=2)"]
    assert [Path(file).name for file in answer["files"]] == ["table.md", "table.csv", "dice.png", "canvases.png"]
    for file in answer["files"]:
        assert Path(file).stat().st_size > 0
    assert (home / "shown" / "dice.png").read_bytes().startswith(b"\x89PNG")


def test_rows_say_quality_and_cost(answer: dict[str, Any]) -> None:
    grid, scaled = answer["rows"]
    assert (grid["seeds"], grid["concat"], scaled["concat"]) == ([0, 1], "grid", "scaled")
    assert (grid["canvases_per_volume"], scaled["canvases_per_volume"]) == (1, 4)
    assert (grid["slices_per_canvas"], scaled["slices_per_canvas"]) == (16, 4)
    assert grid["tokens"] == (64 // 16) ** 2  # the toy's input and patch
    assert (grid["steps"], scaled["steps"]) == (4, 4)
    assert (grid["slices_seen"], scaled["slices_seen"]) == (4 * 16, 4 * 4)
    for row in (grid, scaled):
        assert row["parameters"] > row["trainable_parameters"] > 0
        assert row["seconds_per_volume"] > 0
        assert row["seconds_per_step"] > 0
        assert 0 <= row["dice"] <= 100


def test_the_table_has_the_columns_and_names_what_was_refused(home: Path) -> None:
    text = (home / "shown" / "table.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| Strategy"))
    for column in ("Dice (%)", "± seeds", "± cases", "Jaccard (%)", "ASD (voxel)", "95HD (voxel)",
                   "Canvases per volume", "s per volume", "Tokens per slice", "Slices seen"):  # fmt: skip
        assert column in head
    assert "Pseudo-labels of 2 unlabelled cases, 1 labelled, seeds 0, 1" in text
    assert "4 optimiser steps" in text
    assert "Not run: scaled (n=9)" in text
    assert "concat.scaled.n=9" in text  # the strategy's own words
    assert (home / "shown" / "table.csv").read_text().startswith("Strategy,Dice (%)")


def test_the_record_serves_reports_and_keeps_the_stages(home: Path) -> None:
    store = home / "store"
    done = call("report", "latest", "--format", "csv", "--store", str(store))
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == (home / "shown" / "table.csv").read_text().strip()
    record = Store(store).run("latest")
    assert sweep.referenced(Store(store)) == {key for cell in record["cells"] for key in cell["keys"]}
    assert "0 folders could go" in call("clean", "--store", str(store)).output
    assert "ablate concat" in call("runs", "--store", str(store)).output
    with pytest.raises(UsageError, match="ablate concat"):
        sweep.read_config("latest", store)


def test_python_gives_what_the_command_gives(home: Path, answer: dict[str, Any]) -> None:
    result = cfrbench.ablate("concat", names=NAMES, cases=2, store=home / "store", preset="smoke", set=SMALL,
                             seeds=[0, 1])  # fmt: skip
    assert result.trained == 0
    assert ablations.json_rows(result.cases, result.facts) == answer["rows"]
    assert list(result.table()["title"]) == [row["label"] for row in answer["rows"]]
    assert set(result.facts["ablation"]["refused"]) == {"scaled (n=9)"}


def test_a_run_with_the_same_settings_finds_the_stages_and_all_cases_change_no_key(home: Path) -> None:
    everything = plan_of("concat", home / "store", names=["grid"])
    plain = sweep.plan(BASE.model_copy(update={"bounds": False}), home / "store")
    pseudo = {task.key for task in (*plain.todo, *everything.todo) if task.stage == "pseudo"}
    assert len(pseudo) == 1  # --cases 2 left the third unlabelled case out
    assert not [task for task in (*plain.todo, *everything.todo) if task.stage == "tune"]
    explicit = plan_of("concat", home / "store", names=["grid"], cases=3)
    assert [task.key for task in explicit.todo] == [task.key for task in everything.todo]


def test_cases_are_the_same_for_all_variants_and_seeds(home: Path) -> None:
    chains = plan_of("concat", home / "other", names=NAMES[:2], cases=2, base=BASE.model_copy(update={"seeds": (0, 7)}))
    cases = [[case for case, _ in task.recipe["unlabelled"]] for chain in chains.chains.values() for task in chain
             if task.stage == "pseudo"]  # fmt: skip
    assert cases == [["train-01", "train-02"]] * 4


def test_stages_of_one_variant_are_called_by_it_and_shared_ones_are_not(tmp_path: Path) -> None:
    planned = plan_of("pseudo", tmp_path)
    titles = [task.title for task in planned.todo]
    assert len(titles) == len(set(titles))
    assert sum(task.stage == "tune" for task in planned.todo) == 1
    assert {task.stage for task in planned.todo if "online, decaying weight" in task.title} == {
        "train", "predict", "score"
    }  # fmt: skip
    assert sum(task.stage == "train" for task in planned.todo) == 5  # four guided, one plain


def test_pseudo_compares_modes_and_weights_with_the_plain_method(tmp_path: Path) -> None:
    done = call("ablate", "pseudo", "--preset", "smoke", "--json", *OPTIONS, "--store", str(tmp_path / "store"), "-o",
                str(tmp_path / "shown"))  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert [row["label"] for row in answer["rows"]] == [ablation.UNGUIDED, *ablation.GUIDANCE]
    assert [row["variant"] for row in answer["rows"]] == ["baseline", *["cfr"] * 4]
    assert [Path(file).name for file in answer["files"]] == ["table.md", "table.csv", "dice.png"]
    result = sweep.recall("latest", tmp_path / "store")
    (table,) = ablations.all_tables(result.cases, result.facts)
    gains = table.columns.index("Gain (Dice)")
    dice = {row[0]: float(row[1].replace("0*", "0")) for row in table.rows}
    for row in table.rows[1:]:
        assert float(row[gains]) == pytest.approx(dice[row[0]] - dice[ablation.UNGUIDED], abs=0.011)


def test_tune_compares_fine_tuners_and_lists_pairings_that_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = registry.load("tune", "lora")
    refuse = lambda self, model: "the rank is odd" if self.config.rank % 2 else None  # noqa: E731
    monkeypatch.setattr(lora, "refuses", refuse)
    done = call("ablate", "tune", "--preset", "smoke", "--tuners", "lora,lora:rank=2,none,lora:rank=3", "--cases", "2",
                "--json", *OPTIONS, "--store", str(home / "store"), "-o", str(home / "tuners"))  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    four, two, none = answer["rows"]
    assert (none["label"], none["steps"], none["slices_seen"], none["trainable_parameters"]) == ("none", 0, 0, 0)
    assert (four["label"], two["label"]) == ("lora", "lora (rank=2)")
    assert four["trainable_parameters"] > two["trainable_parameters"]
    assert "the rank is odd" in answer["refused"]["lora (rank=3)"]
    assert [Path(file).name for file in answer["files"]] == ["table.md", "table.csv", "dice.png", "parameters.png",
                                                             "canvases.png"]  # fmt: skip
    head = (home / "tuners" / "table.md").read_text()
    for column in ("Parameters (M)", "Trainable (M)", "Peak memory (MiB)", "s per step"):
        assert column in head
    assert "Equal budget: 4 optimiser steps of fine-tuning each." in head
    assert "Not fine-tuned: none." in head


def test_a_fine_tuner_that_takes_slices_stands_beside_those_that_take_canvases(tmp_path: Path) -> None:
    base = BASE.model_copy(update={"concat": "shuffled"})
    planned = plan_of("tune", tmp_path, base=base, names=["lora", "msa-adapter-3d"])
    canvas, slices = planned.about
    assert (canvas["concat"], canvas["slices_per_canvas"]) == ("shuffled", 16)
    assert (slices["concat"], slices["slices_per_canvas"], slices["slices_seen"]) == ("grid", None, 4 * 16)


def test_a_dry_run_of_everything_built_in_computes_nothing(tmp_path: Path) -> None:
    done = call("ablate", "concat", "--preset", "smoke", "--dry-run", "--json", *OPTIONS, "--store", str(tmp_path))
    assert done.exit_code == 0, done.output
    planned = json.loads(done.stdout)
    names = [name for name in ablation.built_in("concat") if name != ablation.SCALED]
    assert planned["cells"] == len(names) + len(ablation.SCALES)
    assert not (tmp_path / "tune").exists()


def test_scales_go_up_to_all_slices() -> None:
    assert ablation.sweep_scales(80) == [1, 2, 4, 8, 9]
    assert ablation.sweep_scales(16) == [1, 2, 4]
    assert ablation.sweep_scales(1) == [1]


def test_the_scale_sweep_stands_beside_the_grid(tmp_path: Path) -> None:
    planned = plan_of("scale", tmp_path)
    assert [row["label"] for row in planned.about] == ["grid", "scaled 1 x 1", "scaled 2 x 2", "scaled 4 x 4"]
    assert [row["slices_per_canvas"] for row in planned.about] == [16, 1, 4, 16]


def test_quick_has_a_budget_of_its_own_unless_one_is_set() -> None:
    def steps(kind: ablation.Kind, base: RunConfig, **fields: Any) -> Any:
        return ablation.request_of(kind, base, **fields).base.set.get("tuning.steps")

    assert steps("concat", RunConfig()) == ablation.STEPS["quick"]
    assert steps("concat", RunConfig(set={"tuning.steps": 7})) == 7
    assert steps("concat", RunConfig(set={"tuning.steps": 7}), steps=9) == 9
    assert steps("concat", RunConfig(preset="paper")) is None
    assert steps("pseudo", RunConfig()) is None  # its pseudo-labels are those of `cfrbench run`


@pytest.mark.parametrize(
    ("kind", "fields", "error", "words"),
    [
        ("concat", {"names": ["gird"]}, PluginError, "Did you mean 'grid'"),
        ("concat", {"names": ["grid:geometrie=paper"]}, ConfigError, "geometrie"),
        ("concat", {"names": ["scaled:n=9"]}, UsageError, "None of the variants"),
        ("concat", {"cases": 4}, ConfigError, "at most 3"),
        ("tune", {"names": ["lara"]}, PluginError, "Did you mean 'lora'"),
        ("concat", {"base": BASE.model_copy(update={"labels": (4,)})}, ConfigError, "no unlabelled case"),
        ("concat", {"base": BASE.model_copy(update={"labels": (1, 2)})}, ConfigError, "one budget"),
        ("pseudo", {"base": BASE.model_copy(update={"ssl": ("supervised",)})}, ConfigError, "labelled cases alone"),
    ],
)
def test_wrong_use_is_one_paragraph(
    tmp_path: Path, kind: ablation.Kind, fields: dict[str, Any], error: type[CfrbenchError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        plan_of(kind, tmp_path, **fields)
    assert "\n" not in str(caught.value)


def test_options_of_another_ablation_are_refused(tmp_path: Path) -> None:
    done = call("ablate", "tune", "--strategies", "grid", "--store", str(tmp_path))
    assert isinstance(done.exception, UsageError)
    assert "`ablate concat`" in str(done.exception)


def test_a_file_in_the_place_of_the_folder_is_found_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "shown").write_text("")
    done = command(tmp_path)
    assert isinstance(done.exception, CfrbenchError)
    assert not (tmp_path / "store" / "tune").exists()


# ---------------------------------------------------------------------------------------------------------------------
# canvases


def test_show_draws_canvases_and_says_what_stands_on_them(tmp_path: Path) -> None:
    done = call("concat", "show", "--strategy", "scaled:n=2", "--preset", "smoke", "--case", "train-02", "--json",
                *OPTIONS, "-o", str(tmp_path / "sub" / "canvas.png"))  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["case"], facts["canvases"], facts["slices"], facts["slices_per_canvas"]) == ("train-02", 4, 16, 4)
    assert (facts["tiles"], facts["blank_tiles"], facts["side"]) == ([2, 2], 0, 64)
    assert 0 < facts["ignored"] < 1
    assert (tmp_path / "sub" / "canvas.png").read_bytes().startswith(b"\x89PNG")


def test_show_takes_a_canvas_and_a_moment_of_fine_tuning(tmp_path: Path) -> None:
    done = call("concat", "show", "--preset", "smoke", "--canvas", "100", "--done", "0.5", *OPTIONS, "-o",
                str(tmp_path / "canvas.png"))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1 canvas of 100 x 100 pixels" in done.stdout
    assert "6 x 6 tiles, 20 of them blank" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "gird"), "Did you mean 'grid'"),
        (("--case", "train-09"), "has no case 'train-09'"),
        (("--canvas", "40"), "tuning.canvas="),
    ],
)
def test_show_refuses_in_one_paragraph(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = call("concat", "show", "--preset", "smoke", *OPTIONS, "-o", str(tmp_path / "x.png"), *arguments)
    assert isinstance(done.exception, CfrbenchError)
    assert words in str(done.exception)


def test_every_strategy_is_listed() -> None:
    listed = call("concat", "list").stdout
    assert all(name in listed for name in registry.names("concat"))


def test_contents_counts_slices_and_pixels_without_a_label() -> None:
    grid = registry.load("concat", "grid")()
    layout = grid.plan((10, 10, 5), 32)  # 3 x 3 tiles of 10 pixels
    shown = contents(grid, layout)
    assert shown.slices == 5
    assert shown.ignored == pytest.approx(1 - 5 * 100 / 32**2)
    assert tiles(layout) == (3, 3, 4)


def test_slices_per_step_follow_the_canvases_that_are_drawn() -> None:
    scaled = registry.load("concat", "scaled")
    section = Settings().tuning.model_copy(update={"canvas": 64, "canvases": 2})
    assert slices_per_step(scaled(scaled.Config(n=2)), (16, 16, 16), section) == 2 * 4
    assert slices_per_step(registry.load("concat", "grid")(), (16, 16, 16), section) == 16  # there is only one canvas


def test_spread_takes_first_and_last() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(40, 4) == [0, 13, 26, 39]
    assert spread(5, 1) == [0]


def test_the_middle_of_a_small_volume_is_padded() -> None:
    volume = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(middle(volume, (2, 1, 2), 0.0), volume[:, 1:2, 1:3])
    assert middle(volume, (4, 3, 4), -1.0)[:, 0, 0].tolist() == [-1, 0, 12, -1]


def test_the_first_lap_has_no_length() -> None:
    laps = Laps()
    assert laps.typical is None
    laps.lap()
    assert laps.typical is None
    laps.lap()
    assert laps.typical is not None


def test_charts_stand_values_that_are_zero_or_missing(tmp_path: Path) -> None:
    bars = [charts.Bar("grid", 0.0, None, True), charts.Bar("rotated", 0.0, 0.0)]
    charts.draw_bars(bars, "title", "Dice", tmp_path / "bars.png")
    charts.draw_curve([(4, bars[0]), (2, bars[1])], None, "title", "Dice", tmp_path / "curve.png")
    points = [charts.Point("none", 9.8e6, 0, 10.0), charts.Point("lora", 9.9e6, 1e6, 70.0)]
    charts.draw_parameters(points, "title", "Dice", tmp_path / "points.png")
    for name in ("bars", "curve", "points"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert charts.spread_of({"dice_std_seeds": np.nan, "dice_std_cases": 2.5}) == 2.5
    assert charts.spread_of({"dice_std_seeds": np.nan, "dice_std_cases": np.nan}) is None


def test_an_ablation_without_a_finished_variant_still_has_a_table(tmp_path: Path) -> None:
    planned = plan_of("concat", tmp_path, names=["grid", "scaled:n=9"])
    from cfrbench.report.frames import nothing

    (table,) = ablations.all_tables(nothing(), planned.facts())
    assert table.rows == ()
    assert "Not run: scaled (n=9)" in to_csv(table)
