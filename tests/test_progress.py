"""What a person sees while stages run: a class that collapses is named once, until it has been found again."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cfrbench.cli.progress import LiveBars, PlainLines
from cfrbench.contracts import StageTask

TASK, OTHER = (StageTask("train", key, f"train MT · seed {key}") for key in "01")
GONE = {"loss": 0.5, "lost aorta": 1.0}


@pytest.mark.parametrize("view", [LiveBars, PlainLines])
def test_a_lost_class_is_named_once_for_each_stage_and_loss(view: Any) -> None:
    text = io.StringIO()
    watcher = view(Console(file=text, width=200))
    for task in (TASK, OTHER):
        watcher.stage_started(task=task, folder="", total_steps=100)
    told = []
    for task, values in ((TASK, {"loss": 1.0}), (TASK, GONE), (TASK, GONE), (OTHER, GONE), (TASK, {}), (TASK, GONE)):
        watcher.step_done(task=task, step=7, values=values)
        told.append(text.getvalue().count("has collapsed"))
    assert told == [0, 1, 1, 2, 2, 3]
    assert f"warning: {TASK.title}: class 'aorta' has collapsed, at step 7" in text.getvalue()
