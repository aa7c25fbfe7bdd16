"""Method cards say what the classes say, and the committed page is theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cfrbench import cards, registry
from cfrbench.cli import app
from cfrbench.cli import ssl as commands
from cfrbench.config import RunConfig
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.errors import ConfigError, UsageError
from cfrbench.recipes import study_of
from tests.ssl.spy import SIDES, crops, make

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
OURS = [plugin.name for plugin in registry.discover() if plugin.kind == "ssl" and plugin.distribution == "cfrbench"]
assert commands.ssl  # importing it registers the command


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["ssl", *words], catch_exceptions=False)


def test_the_page_of_methods_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == cards.page(sorted(OURS)), "run `make methods`"


@pytest.mark.parametrize("name", OURS)
def test_cards_of_built_ins_are_complete(name: str) -> None:
    found = cards.card(name)
    assert found.summary.endswith((".", ".)"))
    assert found.networks
    assert found.formulas
    assert found.differences
    assert [option.name for option in found.options if not option.description] == []
    assert all(text and not text.endswith(".") for text in found.formulas.values())


#: options that bring losses which the defaults leave out
FORMS: dict[str, list[dict[str, Any]]] = {
    "acmt": [{"criterion": "prototype"}],
    "caussl": [{"form": "cps", "begin_cross": 0}],
    "dtc": [{"ce_weight": 1.0}],
}


@pytest.mark.parametrize("name", OURS)
def test_formulas_are_those_of_the_losses(name: str) -> None:
    names: set[str] = set()
    for options in [{}, *FORMS.get(name, [])]:
        method = make(name, **options)
        for phase in range(len(method.phases())):
            batch = crops(unlabelled=2)
            pseudo = torch.zeros(2, *SIDES, dtype=torch.uint8)
            output = method.step(Batch(batch.image, batch.label, pseudo), Progress(50, 200, phase, 1, 100))
            names |= set(output.losses)
    assert names == set(cards.card(name).formulas)


def test_a_card_names_networks_and_sizes() -> None:
    mt, supervised = cards.card("mt"), cards.card("supervised")
    assert mt.networks == ("student (trains)", "teacher.net (no gradient)")
    assert supervised.networks == ("net (trains)",)
    assert (mt.size, supervised.size) == ("1.00", "1.00")
    assert cards.card("cps").size == "2.00"


def test_a_card_names_options_with_defaults_and_choices() -> None:
    options = {option.name: option for option in cards.card("acmt").options}
    assert options["criterion"].default == "entropy"
    assert options["criterion"].choices == ("entropy", "uncertainty", "prototype", "confident-learning")
    assert options["threshold_stop"].default == "none"
    assert options["ema"].default == "0.99"


class Guest(SSLMethod):
    name, title, reference = "guest", "A|B", "nobody"

    def __init__(self, make_net: Any, num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_net()

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        return StepOutput({})

    def predictor(self) -> nn.Module:
        return self.net


def test_a_guest_that_says_nothing_has_a_card_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda kind, name: Guest if name == "guest" else load(kind, name))
    text = cards.markdown(cards.card("guest"))
    assert text.startswith("## A|B: `guest`\n\nReference: nobody")
    assert "| loss |" not in text


def test_commands_print_cards() -> None:
    assert "0.5 (CE(z_l, y) + Dice(p_l, y))" in run("show", "mt", "--markdown").stdout
    assert run("show", "--all", "--markdown").stdout == cards.page(registry.names("ssl"))
    (found,) = json.loads(run("show", "acmt", "--json").stdout)
    assert found["title"] == "ACMT"
    assert "Reference" in run("show", "mt").stdout
    assert [row["name"] for row in json.loads(run("list", "--json").stdout)] == registry.names("ssl")
    assert "fixmatch" in run("list").stdout
    for words in (["show"], ["show", "mt", "--all"]):
        with pytest.raises(UsageError, match="--all"):
            run(*words)


def test_a_named_config_lays_its_options_below_those_set() -> None:
    small = {"data.phantom.train": 4, "data.phantom.test": 1, "data.phantom.shape": (32, 32, 16)}

    def options(**values: Any) -> Any:
        chosen = {f"ssl.mt.{key}": value for key, value in values.items()}
        return study_of(RunConfig(preset="smoke", set={**small, **chosen})).plugin("ssl", "mt")["options"]

    plain, original = options(), options(config="ssl4mis")
    assert original == {**plain, "form": "ssl4mis", "ramp_length": 200.0, "epoch_steps": 150}
    assert options(config="ssl4mis", ramp_length=7)["ramp_length"] == 7
    with pytest.raises(ConfigError, match=r"'mt' has no options called 'orignal'\. Did you mean 'original'"):
        options(config="orignal")
