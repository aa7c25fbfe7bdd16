"""The main job through the command line and through Python, on the smoke preset."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cfrbench
from cfrbench import registry
from cfrbench.cli import app, compare, data, evaluate, housekeeping, plugins, predict, report, run  # noqa: F401
from cfrbench.errors import CfrbenchError

SMALL = {"data.phantom.train": 4, "data.phantom.test": 2, "data.phantom.shape": (32, 32, 16)}
KEYS = {"dataset", "ssl", "variant", "labels", "seeds", "dice", "jaccard", "asd_voxel", "hd95_voxel", "empty"}


def options(**values: Any) -> list[str]:
    pairs = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in (SMALL | values).items()]
    return [part for pair in pairs for part in ("--set", pair)]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished run of two methods."""
    folder = tmp_path_factory.mktemp("store")
    result = cfrbench.run(ssl=("mt", "acmt"), labels=(1, 2), preset="smoke", set=SMALL, store=folder)
    assert result.failures == {}
    return folder


def test_a_run_has_bounds_baselines_twins_and_pseudo_labels(store: Path) -> None:
    done = call("run", "--preset", "smoke", "--ssl", "mt,acmt", "--labels", "1,2", "--json", "--store", str(store),
                *options())  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["stages"]["trained"] == 0
    assert answer["stages"]["reused"] > 0
    rows = answer["rows"]
    assert all(set(row) == KEYS for row in rows)
    found = {(row["ssl"], row["variant"], row["labels"]) for row in rows}
    methods = {(s, v, n) for s in ("mt", "acmt") for v in ("baseline", "cfr") for n in (1, 2)}
    bounds = {("supervised", "baseline", n) for n in (1, 2, 4)}
    assert found == methods | bounds | {("none", "pseudo-label", 1), ("none", "pseudo-label", 2)}


def test_one_fine_tuning_serves_every_method_of_a_budget(store: Path) -> None:
    assert len(list((store / "tune").iterdir())) == 2
    assert len(list((store / "pseudo").iterdir())) == 2


def test_another_method_only_trains_that_method(store: Path) -> None:
    result = cfrbench.run(ssl=("self-training",), labels=(1,), preset="smoke", set=SMALL, store=store)
    assert result.trained == 2 * 3  # baseline and twin: train, predict, score
    assert result.reused == 1 + 1 + 2  # the pseudo-labels, their score, two bounds; nobody asked for the fine-tuning


def test_twins_share_initial_weights_and_batches(store: Path) -> None:
    """With guidance weight 0 the twin is the baseline, bit for bit: nothing else differs between them."""
    result = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", store=store, bounds=False,
                          set=SMALL | {"training.guidance_weight": 0.0})  # fmt: skip
    table = result.table().set_index("variant")
    assert table.loc["baseline", "dice"] == table.loc["cfr", "dice"]
    cells = {
        cell["variant"]: cell for cell in json.loads((store / "runs" / f"{result.name}.json").read_text())["cells"]
    }
    hashes = []
    for variant in ("baseline", "cfr"):
        key = next(k for k in cells[variant]["keys"] if (store / "train" / k).exists())
        manifest = json.loads((store / "train" / key / "manifest.json").read_text())
        hashes.append({manifest["recipe"]["seed"], manifest["recipe"]["settings"]["training"]["steps"]})
    assert hashes[0] == hashes[1]


def test_rows_do_not_depend_on_the_number_of_processes(store: Path, tmp_path: Path) -> None:
    alone = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=store)
    together = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=tmp_path, jobs=2)
    assert together.failures == {}
    assert together.as_json()["rows"] == alone.as_json()["rows"]


def test_online_pseudo_labels_are_another_protocol_with_other_keys(store: Path) -> None:
    result = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", store=store, bounds=False,
                          set=SMALL | {"pseudo.mode": "online"})  # fmt: skip
    assert result.failures == {}
    assert result.trained == 3  # only the guided training is new


def test_reports_runs_and_explanations_read_the_store(store: Path) -> None:
    for arguments, word in (
        (("report", "latest"), "MT"),
        (("report", "latest", "--format", "markdown"), "| MT"),
        (("report", "latest", "--format", "csv"), "MT"),
        (("report", "latest", "--format", "latex", "--tables", "gains,costs"), "Predict (s)"),
        (("compare", "latest", "latest", "--format", "markdown"), "+0.00"),
        (("compare", "latest", "latest", "--json"), '"protocol_differs": {"a": [], "b": []}'),
        (("runs",), "phantom"),
        (("explain", "latest"), "reused"),
        (("clean",), "could go"),
    ):
        done = call(*arguments, "--store", str(store))
        assert done.exit_code == 0, done.output
        assert word in done.output


def test_a_report_names_what_is_not_finished_and_a_comparison_what_only_one_side_has(
    store: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(store, half)
    record = json.loads(next((half / "runs").glob("phantom-mt-acmt*.json")).read_text(encoding="utf-8"))
    cell = next(one for one in record["cells"] if (one["ssl"], one["variant"], one["labels"]) == ("mt", "cfr", 2))
    shutil.rmtree(half / "score" / cell["score"])
    done = call("report", record["name"], "--format", "markdown", "--store", str(half))
    assert done.exit_code == 0, done.output
    assert "Not finished, rows or seeds are missing: MT + CFR, 2 labels, seed 0." in done.output
    done = call("compare", record["name"], record["name"], "--format", "markdown", "--store", str(store),
                "--other-store", str(half))  # fmt: skip
    assert "Only in A: MT + CFR (2/2)" in done.output


def test_a_dry_run_computes_nothing(tmp_path: Path) -> None:
    done = call("run", "--preset", "smoke", "--ssl", "mt", "--labels", "1", "--dry-run", "--json", "--store",
                str(tmp_path), *options())  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["cells"] == 5
    assert {task["stage"] for task in plan["todo"]} == {"tune", "pseudo", "train", "predict", "score"}
    assert plan["forecast"]["unknown"] == len(plan["todo"])
    assert not (tmp_path / "train").exists()


def test_a_dry_run_says_what_the_rest_will_take(store: Path) -> None:
    cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=store)
    again = ("run", "--preset", "smoke", "--ssl", "mt", "--labels", "1", "--seed-list", "7", "--dry-run", "--store",
             str(store), *options())  # fmt: skip
    plan = json.loads(call(*again, "--json").stdout)
    assert plan["forecast"]["unknown"] == 0
    assert plan["forecast"]["sources"] == ["the same work"]
    assert 0 < plan["forecast"]["wall_seconds"] <= 1.0001 * plan["forecast"]["work_seconds"]  # sums in another order
    assert "GiB at most (learned from the same work)" in call(*again).stdout


def test_a_dry_run_can_time_what_nobody_has_computed(tmp_path: Path) -> None:
    asked = ("run", "--preset", "smoke", "--ssl", "mt", "--labels", "1", "--dry-run", "--probe", "--store",
             str(tmp_path), *options())  # fmt: skip
    done = call(*asked)
    assert "(learned from a probe)" in done.stdout
    assert not (tmp_path / "train").exists()


def test_a_run_can_start_from_the_record_of_another(store: Path) -> None:
    name = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=store).name
    done = call("run", "--config", name, "--json", "--store", str(store))
    assert json.loads(done.stdout)["stages"]["trained"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ssl": ("mean-teacher",)}, "No SSL method called 'mean-teacher'"),
        ({"labels": (99,)}, "99 labelled cases"),
        ({"labels": (4,)}, "nothing is left unlabelled"),
        ({"labels": ("plenty",)}, "not a budget"),
        ({"preset": "paper"}, "checkpoint"),
        ({"set": {"training.stepz": 3}}, "training.stepz"),
        ({"set": {"net.vnet.widht": 3}}, "widht"),
        ({"set": {"net.vnot.width": 3}}, "vnot"),
        ({"set": SMALL | {"tuning.canvas": 16}}, "canvas"),
        ({"seed": 3}, "seed"),
        ({"set": SMALL | {"training.patch": (18, 16, 16), "tuning.patch": (16, 16, 16)}}, "not multiples of 4"),
        ({"set": SMALL | {"net.vnet.depth": 4, "compute.precision": "bf16"}}, "first side of 2"),
        ({"set": {"compute.device": "cuda:7"}}, "cuda:7"),
    ],
)
def test_wrong_use_is_one_paragraph(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    request = {"preset": "smoke", "set": SMALL, "store": tmp_path} | arguments
    with pytest.raises(CfrbenchError, match=words) as caught:
        complain(request)
    assert "\n" not in str(caught.value)


def complain(request: dict[str, Any]) -> None:
    """Run, and raise what a stage reports as what planning reports: some things only a stage can notice."""
    for reason in cfrbench.run(**request).failures.values():
        raise CfrbenchError(reason)


def test_help_and_plugins_answer_at_once_without_torch() -> None:
    for command, limit in ((["--help"], 0.4), (["plugins"], 0.6)):
        code = (
            "import resource, sys; from cfrbench.cli import main; sys.argv = ['cfrbench', *%r]\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print(used.ru_utime + used.ru_stime, 'torch' in sys.modules, file=sys.stderr)"
        )
        seconds = []
        while min(seconds, default=limit) >= limit and len(seconds) < 8:  # neighbours on the same core inflate some
            done = subprocess.run([sys.executable, "-c", code % (command,)], capture_output=True, text=True, check=True)
            used, torch_is_loaded = done.stderr.strip().splitlines()[-1].split()
            assert torch_is_loaded == "False"
            seconds.append(float(used))
        assert min(seconds) < limit


def test_tensorboard_curves_are_written_beside_the_stages(tmp_path: Path) -> None:
    arguments = [
        "run",
        "--preset",
        "smoke",
        "--ssl",
        "mt",
        "--labels",
        "1",
        "--no-bounds",
        "--json",
        "--log",
        "tensorboard",
    ]
    done = call(*arguments, "--store", str(tmp_path), *options())
    assert done.exit_code == 0, done.output
    stages = {folder.name.partition("-")[0] for folder in (tmp_path / "tensorboard").iterdir()}
    assert {"tune", "train"} <= stages
    assert all(list(folder.glob("events.*")) for folder in (tmp_path / "tensorboard").iterdir())
    assert not any("tensorboard" in str(observer) for observer in registry.WATCHERS.get_plugins())
