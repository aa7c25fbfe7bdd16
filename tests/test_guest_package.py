"""The third-party package in docs/examples works as its README says; `.ci/run` installs it beside the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfrbench.testing import check_ssl
from tests.guests import load_example

GUEST = Path(__file__).parents[1] / "docs" / "examples" / "cfrbench-toy-ssl"
SOURCE = (GUEST / "cfrbench_toy_ssl.py").read_text(encoding="utf-8")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The guest's class."""
    guest: type = load_example(GUEST, "ssl", "toy", tmp_path, monkeypatch)
    return guest


def test_the_guest_keeps_every_law_of_an_ssl_method(toy: type) -> None:
    check_ssl(toy)


def test_the_guest_is_one_short_file() -> None:
    assert SOURCE.count("\n") < 40


def test_the_readme_names_what_the_guest_registers() -> None:
    readme = (GUEST / "README.md").read_text(encoding="utf-8")
    assert "--ssl toy" in readme
    assert "toy + CFR" in readme
    assert readme.count("\n") <= 12
