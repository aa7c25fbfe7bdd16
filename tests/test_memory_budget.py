"""`--max-memory`: fewer stages at a time, and no stage that is known to need more."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfrbench import memory_budget, sweep
from cfrbench.config import RunConfig, Settings
from cfrbench.errors import UsageError
from cfrbench.forecast import Cost, Rates

REQUEST = RunConfig(preset="smoke", labels=(1, 2), bounds=False)


def known(monkeypatch: pytest.MonkeyPatch, mib: dict[str, float]) -> None:
    """Let stages of these kinds be known to need so much memory, all others be unknown."""
    costs = {stage: Cost(1.0, peak, 0.0, "the same work") for stage, peak in mib.items()}
    monkeypatch.setattr(Rates, "cost", lambda self, stage, recipes: costs.get(stage.stage))


@pytest.mark.parametrize(("gib", "expected"), [(16.0, 8), (8.0, 4), (5.0, 2), (2.0, 1)])
def test_as_many_stages_at_a_time_as_the_largest_leave_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, expected: int
) -> None:
    known(monkeypatch, dict.fromkeys(("tune", "pseudo", "train", "predict", "score"), 2048.0))
    assert memory_budget.jobs_within(sweep.plan(REQUEST, tmp_path), 8, gib) == expected


def test_a_stage_that_cannot_fit_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, {"train": 4096.0})
    planned = sweep.plan(REQUEST, tmp_path)
    with pytest.raises(UsageError, match=r"train MT.*needs 4\.0 GiB.*--max-memory 3\..*--precision bf16"):
        memory_budget.jobs_within(planned, 1, 3.0)
    assert memory_budget.jobs_within(planned, 1, 4.0) == 1


def test_what_is_unknown_is_run_alone_rather_than_refused(tmp_path: Path) -> None:
    assert memory_budget.jobs_within(sweep.plan(REQUEST, tmp_path), 4, 0.5) == 1


@pytest.mark.parametrize("stage", ["tune", "pseudo", "train", "predict"])
def test_advice_names_options_that_exist(stage: str) -> None:
    words = memory_budget.advice(stage, Settings(), "sam-vit-b", None)
    assert "--" in words
    for key in (word.partition("=")[0] for word in words.split() if word.startswith(("training.", "grid."))):
        section, _, name = key.partition(".")
        assert hasattr(getattr(Settings(), section), name)
