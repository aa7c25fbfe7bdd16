"""The strategy that the documentation writes: shown as it is, registered by one line, and true to every law."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cfrbench import contracts, errors
from cfrbench.contracts import ConcatStrategy
from cfrbench.errors import UsageError
from cfrbench.testing import check_concat
from tests.guests import load_example

DOCS = Path(__file__).parents[2] / "docs"
GUEST = DOCS / "examples" / "cfrbench-checkerboard"
SOURCE = (GUEST / "cfrbench_checkerboard.py").read_text(encoding="utf-8")
PROJECT = (GUEST / "pyproject.toml").read_text(encoding="utf-8")
PAGE = (DOCS / "write-a-strategy.md").read_text(encoding="utf-8")


@pytest.fixture
def checkerboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[ConcatStrategy]:
    """The guest's class."""
    guest: type[ConcatStrategy] = load_example(GUEST, "concat", "checkerboard", tmp_path, monkeypatch)
    return guest


def test_it_keeps_every_law_of_a_strategy(checkerboard: type[ConcatStrategy]) -> None:
    check_concat(checkerboard)


def test_its_slices_stand_as_the_page_draws_them(checkerboard: type[ConcatStrategy]) -> None:
    (drawn,) = re.findall(r"```text\n(.+?)```", PAGE, flags=re.DOTALL)
    strategy = checkerboard()
    layout = strategy.plan((4, 4, 9), 12)
    canvas = strategy.forward(torch.arange(9).expand(4, 4, 9), layout, -1)[0]
    assert [list(map(int, row.split())) for row in drawn.splitlines()] == canvas[1::4, 1::4].tolist()


def test_neighbours_are_of_the_other_half(checkerboard: type[ConcatStrategy]) -> None:
    strategy = checkerboard()
    layout = strategy.plan((4, 4, 14), 16)
    upper = strategy.forward((torch.arange(14) >= 7).to(torch.uint8).expand(4, 4, 14), layout, 9)[0][::4, ::4]
    for one, other in ((upper[1:], upper[:-1]), (upper[:, 1:], upper[:, :-1])):
        assert not bool(((one == other) & (one != 9)).any())


def test_it_refuses_as_the_grid_does(checkerboard: type[ConcatStrategy]) -> None:
    with pytest.raises(UsageError, match=r"hold 9 of 10 slices.*tuning.canvas=16"):
        checkerboard().plan((4, 4, 10), 12)


def test_the_page_shows_the_code_and_the_line_as_they_are() -> None:
    (shown,) = re.findall(r"```python\n(class Checkerboard.+?)```", PAGE, flags=re.DOTALL)
    assert SOURCE.endswith(shown)
    (line,) = re.findall(r"```toml\n(.+?)```", PAGE, flags=re.DOTALL)
    assert line in PROJECT
    assert len(line.splitlines()) == 2
    assert SOURCE.count("\n") < 40


def test_the_three_functions_of_the_page_are_a_strategy_too() -> None:
    (shown,) = re.findall(r"```python\n(class Strip.+?)```", PAGE, flags=re.DOTALL)
    known = {"ConcatStrategy": contracts.ConcatStrategy, "Layout": contracts.Layout, "UsageError": errors.UsageError}
    exec(shown, known)
    check_concat(known["Strip"])
