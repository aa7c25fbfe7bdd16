"""How cost grows: labels, volumes, methods, classes, side of the canvas, each with the exponent it should have at most.

An exponent is the slope of log(cost) over log(size), fitted through the larger half of the sizes, where constant parts
weigh least. Costs are processor seconds of one thread, the least of a few rounds, or numbers of stages. The curves are
drawn into ``docs/pictures/growth.png`` if ``CFRBENCH_DRAW`` is set.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrbench import registry, sweep
from cfrbench.blocked_attention import attend_with_bias
from cfrbench.compute import Compute, seed_torch, single_thread
from cfrbench.config import RunConfig, TrainingSection
from cfrbench.inference import predict_probabilities
from cfrbench.losses import ce_dice, class_map
from cfrbench.metrics import score_case
from cfrbench.prepare import WorkingCase
from cfrbench.retraining import RetrainingTrainee
from cfrbench.training import Schedule

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(900)]

ROUNDS, SLACK = 5, 0.3
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "growth.png"
Work = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """Costs of growing sizes beside the exponent they should have at most."""

    what: str
    over: str
    expected: float
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    unit: str = "CPU ms"

    @property
    def exponent(self) -> float:
        """Slope through the larger half of the sizes, no less than two of them."""
        half = max(2, (len(self.sizes) + 1) // 2)
        return float(np.polyfit(np.log(self.sizes[-half:]), np.log(self.costs[-half:]), 1)[0])


def curve(what: str, over: str, expected: float, sizes: Sequence[int], make: Callable[[int], Work]) -> Curve:
    """Time what ``make`` gives for each size, all sizes in turn."""
    works = [make(size) for size in sizes]
    with single_thread():
        for work in works:
            work()
        rounds = [[_cpu_seconds(work) for work in works] for _ in range(ROUNDS)]
    costs = tuple(1e3 * min(times) for times in zip(*rounds, strict=True))
    return Curve(what, over, expected, tuple(sizes), costs)


def _cpu_seconds(work: Work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# ---------------------------------------------------------------------------------------------------------------------
# what grows


def training_step(labels: int) -> Work:
    """A step of Mean Teacher, of which ``labels`` volumes of 32 x 32 x 32 are labelled."""
    segmenter = registry.load("net", "vnet")
    net = segmenter(segmenter.Config(width=4, depth=2))
    seed_torch(0, "growth")
    method = registry.load("ssl", "mt")(lambda: net.build(1, 2), 2)
    image, label = torch.randn(32, 32, 32), torch.randint(0, 2, (32, 32, 32), dtype=torch.uint8)
    cases = [WorkingCase(str(n), image, label, (32, 32, 32), (1.0, 1.0, 1.0)) for n in range(labels)]
    section = TrainingSection(patch=(16, 16, 16))
    compute = Compute(torch.device("cpu"), "fp32")
    trainee = RetrainingTrainee(method, cases, {"unlabelled": image}, None, section, compute, 0, _no_slide)
    progress = Schedule(100, lambda step, total: 0.01).progress(50)
    return lambda: torch.stack(list(trainee.losses(progress).values())).sum().backward()  # type: ignore[no-untyped-call]


def _no_slide(network: object, image: Tensor) -> Tensor:
    raise AssertionError("Mean Teacher labels no volumes")


def prediction(volumes: int) -> Work:
    """Sliding windows over volumes of 32 x 32 x 24, and their scores."""
    segmenter = registry.load("net", "vnet")
    seed_torch(0, "growth")
    net = segmenter(segmenter.Config(width=4, depth=2)).build(1, 2).eval()
    image = torch.randn(32, 32, 24)

    def work() -> None:
        for _ in range(volumes):
            mask = class_map(predict_probabilities(net, image, (16, 16, 16), 8, 8, 2)[None])[0]
            score_case(mask, mask, 2)

    return work


def losses(classes: int) -> Work:
    """The supervised loss of crops of 48 x 48 x 32, and their class maps."""
    logits = torch.randn(2, classes, 48, 48, 32, requires_grad=True)
    label = torch.randint(0, classes, (2, 48, 48, 32), dtype=torch.uint8)

    def work() -> None:
        ce_dice(logits, label).backward()  # type: ignore[no-untyped-call]
        class_map(logits.detach())

    return work


def scoring(classes: int) -> Work:
    """The scores of as many balls of one size."""
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij")) - 11.5
    ball = ((grid**2).sum(0) < 100).astype(np.uint8)
    moved = np.roll(ball, 1, axis=0)
    truth, mask = (np.concatenate([c * shape for c in range(1, classes)], axis=2) for shape in (ball, moved))
    return lambda: score_case(mask, truth, classes)


def layout(side: int) -> Work:
    """Laying volumes that fill a canvas out on it, slices first in memory as fine-tuning has them, and back."""
    grid, tiles = registry.load("concat", "grid")(), side // 32
    volume = torch.randn(4, 1, tiles * tiles, 32, 32).movedim(2, -1)
    plan = grid.plan((32, 32, tiles * tiles), side)
    return lambda: grid.inverse(grid.forward(volume, plan, 0.0), plan)


def attention(side: int) -> Work:
    """Global attention over the patches of 16 pixels of a canvas, with its bias by rows and columns, forward."""
    cells = side // 16
    query, key, value = torch.randn(3, 2, cells * cells, 64).unbind(0)
    rows, columns = torch.randn(2, 2, cells * cells, cells).unbind(0)
    return lambda: attend_with_bias(query, key, value, rows, columns, 0.125)


def curves() -> list[Curve]:
    """Every measured curve."""
    return [
        curve("training step", "labels", 0, (1, 2, 4, 8, 16, 32), training_step),
        curve("prediction and scores", "volumes", 1, (1, 2, 4, 8), prediction),
        curve("loss and class map", "classes", 1, (2, 4, 8, 16, 32), losses),
        curve("scores", "classes", 1, (2, 4, 8, 16, 32), scoring),
        # sides whose canvases are all too large for a cache, which small ones are not
        curve("layout and inverse", "canvas side", 2, (1024, 1536, 2048, 3072), layout),
        curve("global attention", "canvas side", 4, (256, 384, 512, 768), attention),
    ]


def stages(folder: Path, kind: str, methods: int) -> float:
    """How many stages of a kind a sweep of so many methods plans."""
    names = tuple(name for name in registry.names("ssl") if name != "supervised")[:methods]
    planned = sweep.plan(RunConfig(ssl=names, preset="smoke", bounds=False), folder)
    return float(sum(stage.stage == kind for stage in planned.todo))


# ---------------------------------------------------------------------------------------------------------------------
# the test


def test_cost_grows_as_it_should(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts = (1, 2, 4, 8)
    planned = [
        Curve(f"stages of kind {kind}", "methods", expected, counts,
              tuple(map(partial(stages, tmp_path, kind), counts)), "stages")
        for kind, expected in (("tune", 0), ("pseudo", 0), ("train", 1))
    ]  # fmt: skip
    found = [*curves(), *planned]
    for item in found:
        figures = f"exponent {item.exponent:.2f}, expected {item.expected:g}"
        record_property(f"growth of {item.what} over {item.over}", figures)
        print(f"{item.what} over {item.over}: {figures}")
    if os.environ.get("CFRBENCH_DRAW"):
        draw(found, PICTURE)
    steep = [f"{c.what}: {c.exponent:.2f}" for c in found if c.exponent > c.expected + SLACK]
    assert not steep, f"steeper than expected: {steep}"


def draw(found: Sequence[Curve], path: Path) -> None:
    """One panel a curve: the measured cost, and a dashed line of the expected exponent through its last point."""
    from cfrbench.report.charts import DARK, LINE
    from cfrbench.report.pictures import figure

    rows = math.ceil(len(found) / 3)
    with figure((7.2, 2.1 * rows), "Cost over size, measured (points) and expected (dashed)", path) as sheet:
        panels = sheet.subplots(rows, 3).ravel()
        for panel, item in zip(panels, found, strict=False):
            ideal = [item.costs[-1] * (size / item.sizes[-1]) ** item.expected for size in item.sizes]
            panel.loglog(item.sizes, ideal, "--", color=LINE)
            panel.loglog(item.sizes, item.costs, "o-", color=DARK)
            panel.set_title(f"{item.what}: {item.exponent:.2f}, expected {item.expected:g}", fontsize=7)
            panel.set_xlabel(item.over, fontsize=7)
            panel.set_ylabel(item.unit, fontsize=7)
            panel.set_ylim(min(item.costs) / 2, 2 * max(item.costs))
            panel.set_xticks(item.sizes, [str(size) for size in item.sizes])
            panel.minorticks_off()
            panel.tick_params(labelsize=6)
        for panel in panels[len(found) :]:
            panel.set_visible(False)
