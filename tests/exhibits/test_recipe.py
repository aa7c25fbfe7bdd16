"""Recipes: every table and figure has one that says what the paper says, and a broken one breaks only itself."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cfrbench import registry
from cfrbench.cli import app, reproduce  # noqa: F401 - it registers
from cfrbench.errors import PluginError, UsageError
from cfrbench.exhibits import recipe
from cfrbench.exhibits.recipe import Experiment
from cfrbench.published import NET_TITLES, published
from tests.exhibits.conftest import Guest

TABLES = [f"table-{n}" for n in range(1, 11)]
FIGURES = [f"figure-{n}" for n in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)]
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cfrbench-toy-recipe"
GOOD = """
title = "Good"
about = "A table."
[[experiment]]
dataset = "phantom"
methods = ["mt"]
[[table]]
kind = "comparison"
"""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["reproduce", *arguments])


def built_in() -> list[str]:
    return [p.name for p in registry.discover() if p.kind == "recipe" and p.distribution == "cfrbench"]


# ---------------------------------------------------------------------------------------------------------------------
# the paper's


def test_every_table_and_figure_has_a_recipe_and_the_list_names_them_in_order() -> None:
    assert sorted(built_in()) == sorted([*TABLES, *FIGURES])
    listed = [row["name"] for row in json.loads(call("--list", "--json").stdout)]
    assert [name for name in listed if name in built_in()] == [*TABLES, *FIGURES]
    shown = call("--list").stdout
    assert all(f" {name} " in shown for name in [*TABLES, *FIGURES])


@pytest.mark.parametrize("name", [*TABLES, *FIGURES])
def test_a_recipe_is_whole_and_is_called_as_the_paper_calls_it(name: str) -> None:
    found = recipe.load(name)
    kind, _, number = name.partition("-")
    roman = dict(zip(range(1, 11), ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"], strict=True))
    assert found.title == (f"Table {roman[int(number)]}" if kind == "table" else f"Figure {number}")
    assert found.about.endswith(".")
    assert found.figure, "every exhibit draws something"


def printed(table: int) -> set[tuple[str, int, str, str]]:
    """Data set, labelled cases, method and variant of every row of a table of the paper."""
    rows = published()
    rows = rows[rows["table"] == table]
    return set(zip(rows["dataset"], rows["labelled"], rows["method"], rows["variant"], strict=True))


def asked(experiment: Experiment) -> set[tuple[str, int, str, str]]:
    """The same of an experiment; titles of methods are those of their plug-ins."""
    found = set()
    for place in range(len(experiment.labels)):
        labelled = int(experiment.paper_budget(place))
        for method in experiment.methods:
            title = registry.load("ssl", method).title
            if not (experiment.twins_only and method in experiment.guided):
                found.add((experiment.dataset, labelled, title, "baseline"))
            if method in experiment.guided:
                found.add((experiment.dataset, labelled, title, "cfr"))
        if "lower" in experiment.bounds:
            found.add((experiment.dataset, labelled, NET_TITLES[experiment.net], "baseline"))
    return found


@pytest.mark.parametrize("table", [1, 2, 5, 6, 7, 8])
def test_rows_of_a_recipe_are_the_rows_that_the_paper_prints(table: int) -> None:
    (experiment,) = recipe.load(f"table-{table}").experiment
    rows = asked(experiment)
    upper = {row for row in printed(table) - rows if row[2] in NET_TITLES.values()}
    assert printed(table) - upper == rows
    assert bool(upper) == ("upper" in experiment.bounds)


@pytest.mark.parametrize("table", [3, 4])
def test_where_rows_of_the_paper_are_lost_the_known_ones_are_there(table: int) -> None:
    assert printed(table) <= asked(recipe.load(f"table-{table}").experiment[0])


def test_table_nine_has_the_networks_and_the_fine_tuned_model_of_four_data_sets() -> None:
    experiments = recipe.load("table-9").experiment
    assert all(experiment.tuned and experiment.twins_only for experiment in experiments)
    networks = {row for row in printed(9) if row[3] == "cfr"}
    assert set().union(*map(asked, experiments)) == networks
    assert {row[:2] for row in printed(9)} == {row[:2] for row in networks}


def test_figure_twelve_is_the_papers_sweep() -> None:
    (experiment,) = recipe.load("figure-12").experiment
    assert experiment.labels == (1, 2, 4, 16)
    assert experiment.methods == experiment.guided == ("self-training", "mt", "acmt")


def test_every_plug_in_that_a_recipe_names_is_known_unless_it_is_a_data_set() -> None:
    for name in built_in():
        for experiment in recipe.load(name).experiment:
            assert set(experiment.methods) <= set(registry.names("ssl"))
            assert experiment.net in registry.names("net")
            for row in experiment.variants:
                assert row.concat is None or row.concat in registry.names("concat")
                assert row.tune is None or row.tune in registry.names("tune")


# ---------------------------------------------------------------------------------------------------------------------
# those of others


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'table-3'"):
        recipe.load("tabel-3")
    refused = call("tabel-3", "--preset", "smoke")
    assert refused.exit_code != 0
    assert isinstance(refused.exception, UsageError)


def test_a_guests_recipe_is_listed_after_the_papers_and_nothing_of_it_is_run(guest: Guest) -> None:
    guest("my-table", GOOD)
    assert recipe.load("my-table").title == "Good"
    assert recipe.names()[-1] == "my-table"
    assert [item.status for item in registry.listing() if item.plugin.name == "my-table"] == ["ok"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("title = ", "Invalid value"),
        (GOOD.replace("about", "abuot"), "'abuot' is unknown"),
        (GOOD.replace('methods = ["mt"]', 'methods = ["mt"]\nguided = ["acmt"]'), "guided names acmt"),
        (GOOD.replace('kind = "comparison"', 'kind = "ablation"'), "'ablation' needs an experiment of kind concat"),
        (GOOD.replace('kind = "comparison"', 'kind = "stages"'), "tuned = true"),
        (GOOD + '[[figure]]\nkind = "scales"\n', "'scales' needs an experiment of kind scale"),
        (GOOD.replace('dataset = "phantom"', 'dataset = "phantom"\nlabels = [1, 2]\npaper_labels = [1]'), "one number"),
        (GOOD.replace('dataset = "phantom"', 'dataset = "phantom"\nkind = "tune"'), "no methods"),
    ],
)
def test_a_broken_recipe_is_named_with_its_file_and_reason_and_the_list_goes_on(
    guest: Guest, text: str, reason: str
) -> None:
    path = guest("broken", text)
    with pytest.raises(PluginError, match="broken") as caught:
        recipe.load("broken")
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    rows = {row["name"]: row for row in json.loads(call("--list", "--json").stdout)}
    assert reason in rows["broken"]["reason"]
    assert rows["table-1"]["reason"] == ""


def test_a_missing_file_is_told_in_the_list_of_plug_ins(guest: Guest) -> None:
    path = guest("lost", GOOD)
    path.unlink()
    (item,) = [item for item in registry.listing() if item.plugin.name == "lost"]
    assert item.status == "broken"
    assert str(path) in item.detail


def test_the_example_package_registers_what_it_ships(guest: Guest) -> None:
    entries = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert entries["cfrbench"] == {"recipe.toy-table": "cfrbench_toy_recipe"}
    guest("toy-table", (EXAMPLE / "cfrbench_toy_recipe" / "toy-table.toml").read_text(encoding="utf-8"))
    assert recipe.load("toy-table").title == "Toy table"


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (EXAMPLE.parents[1] / "reproduce.md").read_text(encoding="utf-8")
    assert f"```toml\n{(EXAMPLE / 'cfrbench_toy_recipe' / 'toy-table.toml').read_text(encoding='utf-8')}```" in page


def test_the_page_names_every_kind_of_table_and_figure_and_every_key() -> None:
    page = (EXAMPLE.parents[1] / "reproduce.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in page for kind in [*recipe.DRAWN_OF, *recipe.MADE_OF])
    assert all(f"`{key}`" in page for key in Experiment.model_fields if key != "variants")
