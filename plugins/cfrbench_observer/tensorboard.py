"""TensorBoard curves of every stage: ``cfrbench run ... --log tensorboard``, then ``tensorboard --logdir STORE``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Needs the extra: pip install 'cfrbench[tensorboard]'. Imported here, so that asking for it without says so at once.
import tensorboard  # noqa: F401

from cfrbench.hookspecs import hookimpl

if TYPE_CHECKING:
    from cfrbench.contracts import StageTask

_writers: dict[str, Any] = {}


@hookimpl
def stage_started(task: StageTask, folder: str, total_steps: int) -> None:
    """Open the curves of a stage, beside the store's own folders: the stage's scratch folder does not last."""
    from torch.utils.tensorboard import SummaryWriter

    scratch = Path(folder)
    _writers[task.key] = SummaryWriter(str(scratch.parents[1] / "tensorboard" / scratch.name))


@hookimpl
def step_done(task: StageTask, step: int, values: Mapping[str, float]) -> None:
    """Add one point to each curve."""
    for name, value in values.items():
        _writers[task.key].add_scalar(name, value, step)


@hookimpl
def stage_finished(task: StageTask, seconds: float, values: Mapping[str, Any]) -> None:
    """Write out what is still in memory; a stage that was found finished has no curves."""
    if task.key in _writers:
        _writers.pop(task.key).close()
