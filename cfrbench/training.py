"""The one training loop, for fine-tuners and SSL methods alike.

It owns the optimiser, the learning rate, seeds, checkpoints and the stop signal. What is trained owns its batches,
losses and teachers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from cfrbench.checkpoint import Checkpointer, graceful_stop
from cfrbench.compute import seed_torch
from cfrbench.contracts import Phase, Progress
from cfrbench.errors import CfrbenchError
from cfrbench.heap import large_blocks_apart

StepObserver = Callable[[int, Mapping[str, float]], None]


class Trainee(ABC):
    """What `fit` trains."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates."""

    @abstractmethod
    def losses(self, progress: Progress) -> dict[str, Tensor]:
        """The named losses of one step; the loop minimises their sum. Depends on nothing but state and progress."""

    def after_update(self, progress: Progress) -> None:  # noqa: B027 - optional on purpose
        """Called after each update (moving averages ...)."""

    def remarks(self, progress: Progress) -> dict[str, float]:
        """What else observers are told after an update; it must change neither weights nor what is drawn later."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, for a checkpoint."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""


@dataclass(frozen=True)
class Schedule:
    """How long, in which phases, and at which learning rate (``rate(step, total)`` inside each phase)."""

    steps: int
    rate: Callable[[int, int], float]
    phases: tuple[Phase, ...] = (Phase("train"),)
    parts: int = 1  # batches whose mean gradient makes one update

    def progress(self, step: int) -> Progress:
        """Where ``step`` lies: its phase and its place in that phase."""
        bounds = self._bounds()
        phase = next(i for i, end in enumerate(bounds[1:]) if step < end)
        start, end = bounds[phase], bounds[phase + 1]
        return Progress(step, self.steps, phase, step - start, end - start)

    def _bounds(self) -> list[int]:
        total, running = sum(p.share for p in self.phases), 0.0
        bounds = [0]
        for phase in self.phases:
            running += phase.share
            bounds.append(round(self.steps * running / total))
        return bounds


def fit(
    trainee: Trainee,
    schedule: Schedule,
    optimiser: torch.optim.Optimizer,
    *,
    seed: int,
    checkpoints: Checkpointer | None = None,
    on_step: StepObserver | None = None,
) -> None:
    """Train to the end of ``schedule``, going on from the newest checkpoint if there is one.

    Raises Interrupted after a checkpoint if a stop was signalled, CfrbenchError if the loss is no longer finite.
    """
    with graceful_stop() as stop:
        first = _resume(trainee, optimiser, checkpoints)
        for step in range(first, schedule.steps):
            with large_blocks_apart() if step == first else nullcontext():
                values = _step(trainee, schedule, optimiser, step, seed)
            if on_step:
                on_step(step + 1, values)
            if checkpoints and (checkpoints.due() or stop.requested):
                _save(trainee, optimiser, checkpoints, step + 1)
            if stop.requested:
                raise stop.interrupted(f"after step {step + 1} of {schedule.steps}")


def _step(
    trainee: Trainee, schedule: Schedule, optimiser: torch.optim.Optimizer, step: int, seed: int
) -> dict[str, float]:
    progress = schedule.progress(step)
    rate = schedule.rate(progress.phase_step, progress.phase_total)
    for group in optimiser.param_groups:
        group["lr"] = rate
    seed_torch(seed, "step", step)
    parts = [_backward(trainee, replace(progress, part=part), schedule.parts, optimiser)
             for part in range(schedule.parts)]  # fmt: skip
    optimiser.step()
    trainee.after_update(progress)
    means = {name: fmean(values[name] for values in parts) for name in parts[0]}
    return {**means, "lr": rate, **trainee.remarks(progress)}


def _backward(trainee: Trainee, progress: Progress, parts: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """Add the gradient of one of ``parts`` batches to those of the parts before it; return its losses."""
    losses = trainee.losses(progress)
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    values = {name: float(loss.detach()) for name, loss in losses.items()}
    if not bool(torch.isfinite(total)):
        raise CfrbenchError(f"The loss is not finite at step {progress.step} ({values}). Lower the learning rate "
                            "(--set training.lr=... or tuning.lr=...) or use --precision fp32.")  # fmt: skip
    if progress.part == 0:  # only now: a trainee may have used gradients for something of its own
        optimiser.zero_grad(set_to_none=True)
    (total / parts).backward()  # type: ignore[no-untyped-call]
    return {"loss": float(total.detach()), **values}


def _save(trainee: Trainee, optimiser: torch.optim.Optimizer, checkpoints: Checkpointer, step: int) -> None:
    checkpoints.save(step, {"trainee": trainee.state(), "optimiser": optimiser.state_dict()})


def _resume(trainee: Trainee, optimiser: torch.optim.Optimizer, checkpoints: Checkpointer | None) -> int:
    found = checkpoints.latest() if checkpoints else None
    if found is None:
        return 0
    step, state = found
    trainee.load_state(state["trainee"])
    optimiser.load_state_dict(state["optimiser"])
    return step


def sgd(parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Plain SGD; the loop form, because the fused one is not bit-equal to it."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=False)


def adamw(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with the usual betas (0.9, 0.999)."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, foreach=False)
