"""The third-party package in docs/examples works as its README says; `.ci/run` installs it beside the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cfrbench import registry
from cfrbench.testing import check_ssl
from tests.guests import install

GUEST = Path(__file__).parents[1] / "docs" / "examples" / "cfrbench-toy-ssl"
SOURCE = (GUEST / "cfrbench_toy_ssl.py").read_text(encoding="utf-8")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The guest's class, through the entry point of its own pyproject."""
    project = tomllib.loads((GUEST / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["cfrbench"]
    install(tmp_path, project["name"], {name: (module, SOURCE) for name, module in entries.items()}, project["version"])
    monkeypatch.syspath_prepend(tmp_path)
    registry.discover.cache_clear()
    loaded = registry.load("ssl", "toy")
    # Later tests must not see a guest whose folder is gone.
    registry.discover.cache_clear()
    registry.load.cache_clear()
    return loaded


def test_the_guest_keeps_every_law_of_an_ssl_method(toy: type) -> None:
    check_ssl(toy)


def test_the_guest_is_one_short_file() -> None:
    assert SOURCE.count("\n") < 40


def test_the_readme_names_what_the_guest_registers() -> None:
    readme = (GUEST / "README.md").read_text(encoding="utf-8")
    assert "--ssl toy" in readme
    assert "toy + CFR" in readme
    assert readme.count("\n") <= 12
