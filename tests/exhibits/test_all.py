"""Every recipe of the paper on small phantoms under the preset smoke, into one store: whole, and in minutes."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cfrbench.cli import app, reproduce  # noqa: F401 - it registers
from cfrbench.exhibits import recipe
from cfrbench.exhibits.showing import ENDINGS
from tests.exhibits.conftest import Guest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cfrbench-toy-recipe"

#: figure 12 has 16 labels, so the heart needs more cases than that; three test cases are a best, a median and a worst
SMALL = {
    "data.phantom.shape": [16, 16, 16], "data.phantom.train": 18, "data.phantom.test": 3,
    "data.phantom-organs.shape": [16, 16, 16], "data.phantom-organs.train": 6, "data.phantom-organs.test": 3,
}  # fmt: skip
DATA = ["--dataset", "phantom", "--dataset", "btcv=phantom-organs", "--dataset", "mact=phantom-organs"]
MINUTES = 6
#: what a recipe must show at least: figures drawn, and rows with a Dice in its first table
WHOLE = {
    "table-1": (2, 16), "table-2": (2, 16), "table-3": (3, 6), "table-4": (1, 6), "table-5": (2, 12),
    "table-6": (2, 11), "table-7": (1, 6), "table-8": (1, 6), "table-9": (3, 6),
    "table-10": (1, 2), "figure-1": (1, 5), "figure-4": (1, 4),
    "figure-5": (2, 3), "figure-6": (1, 2), "figure-7": (2, 1), "figure-8": (1, 9), "figure-9": (1, 5),
    "figure-10": (1, 9), "figure-11": (1, 5), "figure-12": (3, 28), "figure-13": (2, 14),
}  # fmt: skip


def rows(path: Path) -> list[list[str]]:
    """Head and rows of a table written as CSV."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.reader(lines))


def call(folder: Path, *more: str) -> dict[str, Any]:
    """All exhibits; what the command says of them, by name."""
    options = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, ["reproduce", "all", *DATA, "--preset", "smoke", *options, "--store",
                                    str(folder / "store"), "-o", str(folder / "out"), "--json", *more])  # fmt: skip
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["refused"] == {}
    return {one["name"]: one for one in answer["exhibits"]}


@pytest.mark.slow
def test_the_example_package_makes_its_table(guest: Guest, tmp_path: Path) -> None:
    guest("toy-table", (EXAMPLE / "cfrbench_toy_recipe" / "toy-table.toml").read_text(encoding="utf-8"))
    small = {"shape": "[16,16,16]", "train": "3", "test": "2"}
    options = [part for key, value in small.items() for part in ("--set", f"data.phantom.{key}={value}")]
    done = CliRunner().invoke(app, ["reproduce", "toy-table", "--preset", "smoke", *options, "--store",
                                    str(tmp_path / "store"), "-o", str(tmp_path)])  # fmt: skip
    assert done.exit_code == 0, done.output
    _, *body = rows(tmp_path / "toy-table" / "toy-table.csv")
    assert [row[0] for row in body] == ["V-Net, lower bound"] * 2 + ["Self-training"] * 2 + ["MT", "MT + CFR"] * 2 + [
        body[-1][0]] * 2  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_recipes_are_made_whole_in_minutes(tmp_path: Path) -> None:
    assert list(WHOLE) == [name for name in recipe.names() if name.startswith(("table-", "figure-"))]
    began = time.process_time()
    made = call(tmp_path)
    assert time.process_time() - began < MINUTES * 60
    for name, (figures, count) in WHOLE.items():
        one, folder = made[name], tmp_path / "out" / name
        assert (one["missing"], one["failed"], one["not_drawn"]) == ([], {}, {}), name
        endings = [Path(file).suffix for file in one["files"]]
        assert all(Path(file).stat().st_size > 100 for file in one["files"])
        assert (endings.count(".png"), endings.count(".pdf")) == (figures, figures), name
        tables = endings.count(".md")
        assert tables >= 1
        assert all(endings.count(ending) == tables for ending in ENDINGS.values()), name
        head, *body = rows(folder / f"{name}.csv")
        assert len(body) == count, name
        quality = 2 if head[1] in ("Lab./unlab.", "Params (M)") else 1
        assert all(row[quality] for row in body), f"{name}: a Dice is missing"
    costs = call(tmp_path, "--dry-run", "--no-probe")
    assert {name: one["stages"] for name, one in costs.items()} == dict.fromkeys(made, 0)
