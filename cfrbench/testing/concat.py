"""The laws of a concatenation strategy, on volumes whose every voxel is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.testing._lab import require

CANVAS = 64
#: cubic, flat, of one slice, not square, with more slices than a row of tiles takes, and some that hardly fit
SHAPES: tuple[Triple, ...] = (
    (16, 16, 4), (8, 8, 1), (8, 8, 3), (12, 8, 5), (8, 12, 10), (7, 9, 11), (16, 16, 16), (30, 20, 7), (64, 64, 40),
)  # fmt: skip
FILL = 17


def check_concat(strategy_cls: type[ConcatStrategy], config: Any = None) -> None:
    """Raise AssertionError, in a sentence, at the first law of `ConcatStrategy` that ``strategy_cls`` breaks."""
    strategy = strategy_cls(config)
    name = strategy_cls.__qualname__
    require(bool(getattr(strategy_cls, "name", "")), f"{name} has no `name`.")
    require(issubclass(strategy_cls.Config, Frozen), f"{name}.Config is not derived from cfrbench.config.Frozen.")
    held = [shape for shape in SHAPES if _check_shape(strategy, name, shape)]
    require(bool(held), f"{name} refuses every shape of {SHAPES} on a canvas of {CANVAS} pixels.")
    _check_vectorised(strategy, name, held[0])


def _check_shape(strategy: ConcatStrategy, name: str, shape: Triple) -> bool:
    """Whether the strategy holds volumes of ``shape``; if it refuses, it must say so in words."""
    where = f"{name} with a volume {shape}"
    try:
        layout = strategy.plan(shape, CANVAS)
    except UsageError as error:
        require(len(str(error).split()) > 5, f"{where} refuses without saying what would fit: '{error}'.")
        return False
    frozen = dataclasses.is_dataclass(layout) and layout.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"{where}: the layout is no frozen dataclass.")
    planned, asked = (tuple(layout.shape), layout.canvas), (shape, strategy.canvas_side(shape, CANVAS))
    require(planned == asked, f"{where}: the layout says {planned}, not the shape and canvas asked for, {asked}.")
    _check_round_trip(strategy, where, layout)
    if strategy.exact:
        _check_nothing_lost(strategy, where, layout)
    _check_labels(strategy, where, layout)
    if strategy.exact:
        _check_means(strategy, where, layout)
    _check_axes(strategy, where, layout)
    _check_repeatable(strategy, where, shape)
    _check_training(strategy, where, shape)
    return True


def _numbered(shape: tuple[int, ...]) -> Tensor:
    """Every voxel another number in [0, 1)."""
    count = int(torch.Size(shape).numel())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return (order.float() / count).view(shape)


def _check_round_trip(strategy: ConcatStrategy, where: str, layout: Layout) -> None:
    volume = _numbered(layout.shape)
    if not strategy.exact:  # resampling has no business with white noise
        steps = [torch.linspace(0.0, 1.0, side) for side in layout.shape]
        volume = (steps[0][:, None, None] + steps[1][:, None] + steps[2]) / 3.0
    given = volume.clone()
    canvases = strategy.forward(volume, layout, 0.0)
    wanted = (layout.count, layout.canvas, layout.canvas)
    require(tuple(canvases.shape) == wanted, f"{where}: canvases are {tuple(canvases.shape)}, not {wanted}.")
    back = strategy.inverse(canvases, layout)
    require(back.shape == volume.shape, f"{where}: inverse(forward(v)) is {tuple(back.shape)}.")
    error = float((back - volume).abs().max())
    limit = 0.0 if strategy.exact else strategy.tolerance * float(volume.max() - volume.min())
    require(error <= limit, f"{where}: inverse(forward(v)) is off by {error:.3g} of the value range, though the "
                            f"strategy states {limit:.3g}.")  # fmt: skip
    require(torch.equal(given, volume), f"{where}: `forward` changes its input.")


def _check_labels(strategy: ConcatStrategy, where: str, layout: Layout) -> None:
    """Labels there and back are labels: of their type, and none that was not there."""
    label = (_numbered(layout.shape) * 4).floor().to(torch.uint8) * 50
    back = strategy.inverse(strategy.forward(label, layout, FILL), layout)
    require(back.dtype == label.dtype, f"{where}: uint8 labels come back as {back.dtype}.")
    new = sorted(set(back.flatten().tolist()) - set(label.flatten().tolist()))
    require(not new, f"{where}: labels come back with new values {new[:5]}; pick labels, never interpolate them.")
    require(not strategy.exact or torch.equal(back, label), f"{where}: labels do not come back voxel for voxel.")


def _check_means(strategy: ConcatStrategy, where: str, layout: Layout) -> None:
    """A voxel comes back as the mean over the places where it stands, and images stand where their labels do."""
    voxels = int(torch.Size(layout.shape).numel())
    numbers = torch.arange(voxels).view(layout.shape)
    places = strategy.forward(numbers, layout, -1)
    held = places >= 0
    alike = torch.equal(strategy.forward(numbers.float(), layout, -1)[held], places[held].float())
    require(alike, f"{where}: a volume of floats is laid out otherwise than its labels.")
    visits = places[held].bincount(minlength=voxels)
    require(strategy.averages or int(visits.max()) == 1, f"{where}: voxels stand on several canvases, but `averages` "
                                                         "is False.")  # fmt: skip
    canvases = _numbered(tuple(places.shape))
    mean = torch.zeros(voxels).index_add(0, places[held], canvases[held]) / visits
    error = float((strategy.inverse(canvases, layout) - mean.view(layout.shape)).abs().max())
    require(error <= 1e-5, f"{where}: `inverse` is off by {error:.3g} from the mean over all places of a voxel.")


def _check_training(strategy: ConcatStrategy, where: str, shape: Triple) -> None:
    """Plans for fine-tuning can be laid out, whole and in part, at any stage of it."""
    volume = _numbered(shape)
    for done in (0.0, 0.5, 0.99):
        layout = strategy.plan_training(shape, CANVAS, draw=3, done=done)
        canvases = strategy.forward(volume, layout, 0.0)
        wanted = (layout.count, layout.canvas, layout.canvas)
        require(tuple(canvases.shape) == wanted, f"{where}: canvases in fine-tuning are {tuple(canvases.shape)}, not "
                                                 f"{wanted}.")  # fmt: skip
        chosen = sorted({0, layout.count // 2, layout.count - 1})
        some = strategy.forward_some(volume, layout, 0.0, chosen)
        require(torch.equal(some, canvases[chosen]), f"{where}: `forward_some` differs from `forward`.")
        again = strategy.plan_training(shape, CANVAS, draw=3, done=done)
        repeated = torch.equal(strategy.forward(volume, again, 0.0), canvases)
        require(repeated, f"{where}: two plans for fine-tuning of draw 3 differ; draw from ``draw`` alone.")


def _check_nothing_lost(strategy: ConcatStrategy, where: str, layout: Layout) -> None:
    """On the canvas stands every voxel once, and ``fill`` everywhere else; labels stay integers."""
    label = torch.ones(layout.shape, dtype=torch.uint8)
    canvases = strategy.forward(label, layout, FILL)
    require(canvases.dtype == label.dtype, f"{where}: uint8 labels become {canvases.dtype}.")
    ones, fill = int((canvases == 1).sum()), int((canvases == FILL).sum())
    require(ones >= label.numel(), f"{where}: {label.numel() - ones} voxels are not on the canvas.")
    require(ones + fill == canvases.numel(), f"{where}: pixels without a slice do not hold `fill`.")


def _check_axes(strategy: ConcatStrategy, where: str, layout: Layout) -> None:
    """Leading axes are batches of independent volumes; extra axes of a canvas (classes) are kept."""
    volumes = _numbered((2, 3, *layout.shape))
    canvases = strategy.forward(volumes, layout, 0.0)
    alone = strategy.forward(volumes[1, 2], layout, 0.0)
    require(tuple(canvases.shape[:2]) == (2, 3), f"{where}: leading axes are not kept by `forward`.")
    require(torch.equal(canvases[1, 2], alone), f"{where}: volumes of one batch are not laid out independently.")
    back = strategy.inverse(canvases, layout)
    same = back.shape == volumes.shape and torch.equal(back[1, 2], strategy.inverse(alone, layout))
    require(same, f"{where}: `inverse` does not keep leading axes such as classes.")


def _check_repeatable(strategy: ConcatStrategy, where: str, shape: Triple) -> None:
    """One draw, one layout: the plan is a function of its arguments."""
    volume = _numbered(shape)
    for draw in (0, 5):
        first, second = (strategy.forward(volume, strategy.plan(shape, CANVAS, draw=draw), 0.0) for _ in range(2))
        require(torch.equal(first, second), f"{where}: two plans of draw {draw} differ; draw from ``draw`` alone.")


def _check_vectorised(strategy: ConcatStrategy, name: str, shape: Triple) -> None:
    """The number of tensor operations does not grow with the number of slices."""
    depths = [depth for depth in range(1, 17) if _holds(strategy, (*shape[:2], depth))]
    few, many = (*shape[:2], depths[0]), (*shape[:2], depths[-1])
    for verb, prepare in (("forward", _forward), ("inverse", _inverse)):
        growth = _operations(prepare(strategy, many)) - _operations(prepare(strategy, few))
        slices = depths[-1] - depths[0]
        require(growth <= slices // 2, f"`{verb}` of {name} runs {growth} more tensor operations for {slices} more "
                                       "slices: it loops over them in Python.")  # fmt: skip


def _holds(strategy: ConcatStrategy, shape: Triple) -> bool:
    try:
        strategy.plan(shape, CANVAS)
    except UsageError:
        return False
    return True


def _forward(strategy: ConcatStrategy, shape: Triple) -> Callable[[], Tensor]:
    volume, layout = _numbered(shape), strategy.plan(shape, CANVAS)
    return lambda: strategy.forward(volume, layout, 0.0)


def _inverse(strategy: ConcatStrategy, shape: Triple) -> Callable[[], Tensor]:
    layout = strategy.plan(shape, CANVAS)
    canvases = strategy.forward(_numbered(shape), layout, 0.0)
    return lambda: strategy.inverse(canvases, layout)


class _Counter(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operations(call: Callable[[], Tensor]) -> int:
    with _Counter() as counter:
        call()
    return int(counter.count)
