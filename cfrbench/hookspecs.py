"""The table of contents: everything a plug-in can add or watch.

A plug-in is a module named by an entry point ``kind.name`` in the group ``cfrbench``. It implements the hook of its
kind and returns classes, never instances. The module is imported when its name is first asked for, so it may import
torch; listing names imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from cfrbench import contracts

PROJECT = "cfrbench"
#: in the values of `step_done`: this and a class's name, where the network in training finds the class no more
LOST = "lost "

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def concat_strategies() -> list[type[contracts.ConcatStrategy]]:  # type: ignore[empty-body]
    """Ways of laying a volume out as one image. Asked for once, when ``concat.NAME`` is first used."""


@hookspec
def foundation_models() -> list[type[contracts.FoundationModel]]:  # type: ignore[empty-body]
    """Pre-trained promptable models. Asked for once, when ``model.NAME`` is first used."""


@hookspec
def fine_tuners() -> list[type[contracts.FineTuner]]:  # type: ignore[empty-body]
    """Ways of fitting a foundation model to few labels. Asked for once, when ``tune.NAME`` is first used."""


@hookspec
def ssl_methods() -> list[type[contracts.SSLMethod]]:  # type: ignore[empty-body]
    """Semi-supervised training methods. Asked for once, when ``ssl.NAME`` is first used."""


@hookspec
def segmenters() -> list[type[contracts.Segmenter]]:  # type: ignore[empty-body]
    """3D networks. Asked for once, when ``net.NAME`` is first used."""


@hookspec
def data_sources() -> list[type[contracts.DataSource]]:  # type: ignore[empty-body]
    """Data sets. Asked for once, when ``data.NAME`` is first used."""


@hookspec
def executors() -> list[type[contracts.Executor]]:  # type: ignore[empty-body]
    """Where stages run. Asked for once, when ``executor.NAME`` is first used."""


# Observers: called as things happen, answers are ignored. Built-in ones draw progress and write logs.


@hookspec
def run_planned(plan: Sequence[contracts.StageTask], reused: int) -> None:
    """A run knows its stages, in order; ``reused`` of them are already in the store."""


@hookspec
def stage_waiting(task: contracts.StageTask) -> None:
    """Another process is computing this stage; this one waits for its result."""


@hookspec
def stage_started(task: contracts.StageTask, folder: str, total_steps: int) -> None:
    """A stage begins in ``folder`` (its log's home) and will take ``total_steps`` steps or items."""


@hookspec
def step_done(task: contracts.StageTask, step: int, values: Mapping[str, float]) -> None:
    """One optimiser step or one case is done; ``values`` are losses, rates or scores by name, and lost classes."""


@hookspec
def stage_finished(task: contracts.StageTask, seconds: float, values: Mapping[str, Any]) -> None:
    """A stage's artifact is complete; ``values`` is a short summary."""


@hookspec
def run_finished(name: str, seconds: float) -> None:
    """Every stage of the run is done and its record ``name`` is written."""
