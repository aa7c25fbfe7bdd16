"""Intensities of crops as foundation models see them: their scale, and random changes in fine-tuning.

The official code bends the grey values of single slices along cubic Bezier curves (``ShumengLI/CFR``
code/utils/bezier_curve.py and util.py; its default, mode 2 with rate 0.5; the paper does not mention it). The curve
lives on [0, 1] and clamps outside, so on z-scored crops a changed slice loses everything below 0 and above 1: mode
``bezier`` reproduces that, ``bezier-rescaled`` bends the slice's own range instead, ``gamma`` is for crops in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cfrbench.errors import ConfigError, UsageError, suggest

Floats = NDArray[np.float64]
Curve = Callable[[Floats, Floats], Floats]

#: samples of a curve, as in the original; with 2000 the values differ by at most about 4e-6
NODES = 100_000

#: gamma is between 1/2 and 2, evenly in its logarithm; contrast and brightness change by at most these shares
LOG_GAMMA, CONTRAST, BRIGHTNESS = float(np.log(2)), 0.1, 0.05


#: the shares of voxels at which a crop is clipped before it is scaled to [0, 1] (bowang-lab/MedSAM preprocessing)
PERCENTILES = (0.005, 0.995)
SAMPLE = 1 << 16  # voxels from which percentiles are taken


def rescale_to_unit(crops: Tensor) -> Tensor:
    """Clip each crop of ``(B, H, W, D)`` to its 0.5-99.5 percentiles and scale it to [0, 1]; constants become 0.

    The percentiles are those of about 65,000 evenly strided voxels, which cost a tenth of sorting the crop.
    """
    low, high = _percentiles(crops)
    return ((crops - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)


def _percentiles(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper percentile of each crop ``(B, H, W, D)`` as ``(B, 1, 1, 1)``."""
    voxels = crops.flatten(1)
    step = max(1, voxels.shape[1] // SAMPLE)
    # A step that shares a factor with a side would meet the same rows or slices again and again.
    while math.gcd(step, math.prod(crops.shape[1:])) > 1:
        step += 1
    ordered = voxels[:, ::step].sort(dim=1).values
    low, high = (ordered[:, round(q * (ordered.shape[1] - 1))].view(-1, 1, 1, 1) for q in PERCENTILES)
    return low, high


def augment_intensity(crops: Tensor, mode: str, rate: float, rng: np.random.Generator) -> Tensor:
    """Return ``(B, H, W, D)`` crops with random intensity changes; the input is never modified.

    mode: ``none``; ``bezier`` or ``bezier-rescaled``, each slice with probability ``rate`` along a curve of its own;
    ``gamma``, each crop with probability ``rate``, for values in [0, 1] only. Every call of one mode takes the same
    number of draws from ``rng``, whatever the crops hold. UsageError for values out of range, ConfigError for a mode.
    """
    if crops.ndim != 4:
        raise UsageError(f"Crops to augment have the shape (B, H, W, D), not {tuple(crops.shape)}. Reshape them.")
    if mode == "none":
        return crops
    if mode == "gamma":
        return _gamma(crops, rate, rng)
    if mode not in CURVES:
        raise ConfigError(f"No intensity change called '{mode}'. {suggest(mode, ('none', 'gamma', *CURVES))}")
    chosen = rng.random((crops.shape[0], crops.shape[3])) < rate
    points = bezier_points(rng.random((*chosen.shape, 4)))
    return bend_slices(crops, chosen, points[chosen], CURVES[mode])


# ---------------------------------------------------------------------------------------------------------------------
# Bezier curves


def bezier_points(draws: ArrayLike) -> Floats:
    """Control points ``(..., 4, 2)`` from four numbers ``(..., 4)`` in [0, 1): (0,0), (u1,u2), (u3,u4), (1,1)."""
    inner = np.asarray(draws, dtype=np.float64)
    low, high = np.zeros((*inner.shape[:-1], 2)), np.ones((*inner.shape[:-1], 2))
    return np.stack([low, inner[..., :2], inner[..., 2:], high], axis=-2)


def bezier_curve(points: ArrayLike, nodes: int = NODES) -> tuple[Floats, Floats]:
    """Coordinates x and y ``(nodes,)`` of the curve through four control points ``(4, 2)``, from the last to the first.

    The original runs backwards too (the parameter's powers stand in reverse order); sorting hides it.
    """
    x, y = np.asarray(points, dtype=np.float64).T
    return np.dot(x, _bernstein(nodes)), np.dot(y, _bernstein(nodes))


def bezier_map(values: NDArray[Any], points: ArrayLike, monotone: Literal["both", "x"] = "both",
               nodes: int = NODES) -> Floats:  # fmt: skip
    """Send ``values`` (any shape) along a curve; what lies outside its ends gets the value of the nearer end.

    monotone: ``both`` sorts x and y (the default, official mode 2: rising), ``x`` sorts x only (the other half of
    official mode 1: y may fall, and starts high).
    """
    x, y = bezier_curve(points, nodes)
    # A cubic rises and falls at most three times: the merging sort finds these runs and is 8 times faster.
    x = np.sort(x, kind="stable")
    mapped: Floats = np.interp(values, x, np.sort(y, kind="stable") if monotone == "both" else y)
    return mapped


def bezier_map_rescaled(values: NDArray[Any], points: ArrayLike) -> Floats:
    """`bezier_map` over the range of ``values`` itself, so that nothing is clamped; a constant stays as it is."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    if low == high:
        return values
    span = high - low
    mapped: Floats = low + span * bezier_map((values - low) / span, points)
    return mapped


CURVES: dict[str, Curve] = {"bezier": bezier_map, "bezier-rescaled": bezier_map_rescaled}


def bend_slices(crops: Tensor, chosen: NDArray[np.bool_], points: Floats, curve: Curve = bezier_map) -> Tensor:
    """Copy ``(B, H, W, D)`` crops with the n slices marked in ``chosen`` (B, D) sent along ``points`` (n, 4, 2).

    The copy holds the slices first in memory, as concatenation likes them. (The original writes into its input.)
    """
    stack = crops.detach().movedim(-1, 1).clone(memory_format=torch.contiguous_format)
    if chosen.any():
        mask = torch.from_numpy(chosen).to(crops.device)
        slices = stack[mask].double().cpu().numpy()
        # Slice by slice on purpose: sorting and searching all curves as one batch of tensors takes four times as long.
        bent = np.stack([curve(values, control) for values, control in zip(slices, points, strict=True)])
        stack[mask] = torch.from_numpy(bent).to(stack)
    return stack.movedim(1, -1)


@cache
def _bernstein(nodes: int) -> Floats:
    """Cubic Bernstein polynomials ``(4, nodes)``, made once: they cost five times the rest of a curve."""
    t = np.linspace(0.0, 1.0, nodes)
    table: Floats = np.stack([weight * t ** (3 - i) * (1 - t) ** i for i, weight in enumerate((1.0, 3.0, 3.0, 1.0))])
    table.flags.writeable = False
    return table


# ---------------------------------------------------------------------------------------------------------------------
# gamma


def _gamma(crops: Tensor, rate: float, rng: np.random.Generator) -> Tensor:
    low, high = crops.aminmax()
    # Half precision may miss the ends by rounding; more is a crop of another scale.
    if low < -1e-2 or high > 1 + 1e-2:
        raise UsageError(
            f"The intensity change 'gamma' is for crops in [0, 1], but these span {low:.3g} .. {high:.3g}. Choose a "
            "foundation model that normalises to [0, 1], or set tuning.intensity=bezier-rescaled."
        )
    gate, *draws = rng.random((4, len(crops)))
    scale = (LOG_GAMMA, CONTRAST, BRIGHTNESS)
    log_gamma, contrast, brightness = (
        torch.from_numpy(s * (2 * d - 1)).to(crops)[:, None, None, None] for s, d in zip(scale, draws, strict=True)
    )
    bent = ((crops.clamp(0, 1) ** log_gamma.exp() - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)
    chosen = torch.from_numpy(gate < rate).to(crops.device)[:, None, None, None]
    return torch.where(chosen, bent, crops)
