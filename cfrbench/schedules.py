"""Numbers that change with the training step: ramps, consistency weights, thresholds, learning rates, EMA decay.

A ``step`` is always the 0-based counter before the update it belongs to. Sources: ``utils/ramps.py`` and the training
loops of yulequan/UA-MT, HiLab-git/SSL4MIS, lemoshu/AC-MT and ShumengLI/CFR.
"""

from __future__ import annotations

import math
from typing import Literal

from cfrbench.errors import ConfigError, suggest

LearningRatePolicy = Literal["step", "poly-a", "poly-b", "constant", "finetune"]
POLICIES: tuple[LearningRatePolicy, ...] = ("step", "poly-a", "poly-b", "constant", "finetune")

#: iterations that all these repositories call an epoch when they ramp, however long their loader is
EPOCH_STEPS = 150


def sigmoid_rampup(current: float, length: float) -> float:
    """Return ``exp(-5 (1 - x)^2)`` with x = current / length clipped to [0, 1]: 0.0067 at 0; 1 for length 0."""
    if length == 0:
        return 1.0
    remaining = 1.0 - min(max(current, 0.0), length) / length
    return math.exp(-5.0 * remaining * remaining)


def linear_rampup(current: float, length: float) -> float:
    """Return current / length clipped to [0, 1]; 1 for length 0."""
    return 1.0 if current >= length else max(current, 0.0) / length


def cosine_rampdown(current: float, length: float) -> float:
    """Return half a cosine wave from 1 at 0 down to 0 at ``length``, 0 after it."""
    return 0.0 if current >= length else 0.5 * (math.cos(math.pi * max(current, 0.0) / length) + 1.0)


def consistency_weight(step: int, maximum: float, length: float, epoch_steps: int = EPOCH_STEPS) -> float:
    """Return ``maximum * sigmoid_rampup(step // epoch_steps, length)``; ``length`` counts epochs."""
    return maximum * sigmoid_rampup(step // epoch_steps, length)


def threshold_rampup(step: int, total: int, start: float, stop: float) -> float:
    """Return ``start + (stop - start) * sigmoid_rampup(step, total)``.

    The thresholds of UA-MT (0.75 to 1) and ACMT (0.75 to 0.95 or 0.9) ramp over raw steps, not epochs, so they depend
    on how long training is; entropies that are not normalised need the result times ln C.
    """
    return start + (stop - start) * sigmoid_rampup(step, total)


def learning_rate(
    policy: LearningRatePolicy, base: float, step: int, total: int, *, power: float = 0.9, warmup_steps: int = 0
) -> float:
    """Return the learning rate in force during ``step`` of ``total``.

    - ``step``: times 0.1 after each 2500/6000 of training, so 2500 and 5000 at the official 6000 (UA-MT, DTC, CFR on
      LA, BraTS and MACT); the officials always use 2500, which would leave a short run without any decay.
    - ``poly-a``: one step behind, ``(1 - max(step - 1, 0) / total)^power`` (SSL4MIS, AC-MT, CPCL).
    - ``poly-b``: ``(1 - step / total)^power`` (SSL4MIS CPS, CFR on BTCV).
    - ``constant``: ``base``.
    - ``finetune``: poly-b after a linear warm-up of ``warmup_steps`` that pushes the decay back without shortening it,
      so with warm-up the last rate is above 0 (SAMed; the official CFR option of 250 steps cannot be run).
    """
    if policy == "constant":
        return base
    if policy == "step":
        return base * float(0.1 ** (step * 6000 // (total * 2500)))
    if policy == "finetune" and step < warmup_steps:
        return base * (step + 1) / warmup_steps
    shifts = {"poly-a": 1, "poly-b": 0, "finetune": warmup_steps}
    if policy not in shifts:
        raise ConfigError(f"Unknown learning-rate policy '{policy}'. {suggest(policy, POLICIES)}")
    return base * float(max(1.0 - max(step - shifts[policy], 0) / total, 0.0) ** power)


def ema_decay(step: int, maximum: float = 0.99) -> float:
    """Return ``min(1 - 1 / (step + 1), maximum)``: 0 at step 0, where the teacher becomes a copy of the student."""
    return min(1.0 - 1.0 / (step + 1), maximum)
