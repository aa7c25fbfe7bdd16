"""Moving averages of networks (mean teachers)."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Set every teacher parameter to ``decay * teacher + (1 - decay) * student``, in place.

    Buffers are left alone: the teacher's batch-norm statistics come from its own forward passes, as in every official
    implementation (yulequan/UA-MT, HiLab-git/SSL4MIS, ShumengLI/CFR: ``update_ema_variables``).
    """
    for average, current in zip(teacher.parameters(), student.parameters(), strict=True):
        average.mul_(decay).add_(current, alpha=1.0 - decay)
