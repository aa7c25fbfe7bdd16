"""A training step of every SSL method against one of `supervised` on the same shapes, beside what its passes need.

Run with ``pytest benchmarks/test_ssl_step_speed.py -m benchmark_only -s``. The ideal is the ratio of the operations in
convolutions, forward and backward: how many passes the method makes, weighed by their size. What is above it is losses,
masks, distance maps, moving averages. Figures are processor seconds, which other processes disturb least.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cfrbench import registry
from cfrbench.compute import seed_torch
from cfrbench.config import TrainingSection
from cfrbench.contracts import Batch, Progress, SSLMethod
from cfrbench.schedules import learning_rate
from cfrbench.training import Schedule, sgd

pytestmark = pytest.mark.benchmark_only

SIDES, HALF, CLASSES, ROUNDS = (32, 32, 32), 2, 2, 2
#: BCP passes half of the crops at a time and officially has four of either kind, so it gets them here too
HALVES = {"bcp": 4}
NAMES = registry.names("ssl")
#: how far above its ideal a method may be; ICT is that far, because its teacher sees one small crop at a time
BOUND = 1.9


def batch_for(plugin: type[SSLMethod], half: int) -> Batch:
    """Smooth crops with a ball in each; the supervised bound gets labels for all of them, as in training."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.meshgrid(*(torch.linspace(-1.0, 1.0, side) for side in SIDES), indexing="ij")
    ball = torch.stack(grid).square().sum(0) < 0.3
    image = 0.5 * torch.randn(2 * half, 1, *SIDES, generator=draw) + ball
    label = ball.to(torch.uint8).expand(2 * half, *SIDES)
    if not plugin.uses_unlabelled:
        return Batch(image, label)
    return Batch(image, label[:half], own=label[half:] if plugin.relabels else None)


def stepper(name: str, half: int) -> Callable[[], None]:
    """One whole training step of a method on a V-Net, late in its last phase, on ``half`` crops of either kind."""
    plugin, vnet = registry.load("ssl", name), registry.load("net", "vnet")
    segmenter = vnet(vnet.Config())
    seed_torch(0, "benchmark-init")
    method: SSLMethod = plugin(lambda: segmenter.build(1, CLASSES), CLASSES).train()
    method.fit_to(SIDES)
    batch, section = batch_for(plugin, half), TrainingSection()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimiser = sgd(parameters, section.lr, section.momentum, section.weight_decay)
    schedule = Schedule(
        section.steps, lambda step, total: learning_rate("step", section.lr, step, total), method.phases()
    )
    steps = iter(range(section.steps * 9 // 10, section.steps))

    def step() -> None:
        progress: Progress = schedule.progress(next(steps))
        seed_torch(0, "benchmark", progress.step)
        losses = method.step(batch, progress).losses
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        method.after_update(progress)

    return step


def operations(step: Callable[[], None]) -> int:
    """Multiplications and additions in convolutions, forward and backward, of the step after the next.

    The next one may do what only some do: CauSSL's search every few dozen steps.
    """
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    total: int = counter.get_total_flops()
    return total


def seconds_in_turns(*steps: Callable[[], None]) -> list[float]:
    """Least processor time of each step, called in turns after a warm-up."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS + 1):
        for step, taken in zip(steps, times, strict=True):
            begin = time.process_time()
            step()
            taken.append(time.process_time() - begin)
    return [min(taken[1:]) for taken in times]


@pytest.mark.parametrize("name", NAMES)
def test_step(name: str, record_property: Callable[[str, object], None]) -> None:
    plain, step = (stepper(method, HALVES.get(name, HALF)) for method in ("supervised", name))
    ideal = operations(step) / operations(plain)
    unit, taken = seconds_in_turns(plain, step)
    ratio = taken / unit
    print(
        f"\n  {name}: {ratio:.2f} x supervised ({unit:.2f} s), ideal {ideal:.2f}, overhead {ratio / ideal:.2f}",
        end=" ",
    )
    record_property(f"a step of {name} against supervised", f"{ratio:.2f} times as long, {ideal:.2f} by operations")
    assert ratio / ideal < BOUND
