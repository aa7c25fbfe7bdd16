"""The CFR term: pseudo-labels of the foundation model guide any SSL method, which need not know.

``ShumengLI/CFR`` code/train_retraining.py adds 0.5 (CE + Dice) of the student on the unlabelled crops against the
pseudo-labels to the loss of Mean Teacher. Here it is added around whatever `SSLMethod.step` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfrbench.config import TrainingSection
from cfrbench.contracts import StepOutput
from cfrbench.errors import UsageError
from cfrbench.losses import ce_dice


def guidance_loss(output: StepOutput, pseudo: Tensor, weight: float) -> Tensor:
    """Return ``weight`` times the sum over guided networks of 0.5 (CE + Dice) against ``pseudo`` ``(U, H, W, D)``.

    A sum, not a mean: each network of a two-network method is taught as strongly as the one of a one-network method.
    Where the method moved its crops, the pseudo-labels that it moved with them are learnt, and nothing beside them.
    Raises UsageError if the method names no logits on unlabelled crops.
    """
    if not output.guided:
        raise UsageError(
            "This SSL method cannot be guided: its step returns no logits on unlabelled crops (StepOutput.guided is "
            "empty). Train it without pseudo-labels, as a baseline, or choose a method that uses unlabelled data."
        )
    moved = output.guided_pseudo
    target = pseudo if moved is None else moved
    terms = [ce_dice(logits, target, only_labelled=moved is not None) for logits in output.guided]
    return weight * torch.stack(terms).sum()


def guidance_weight(training: TrainingSection, step: int, total: int) -> float:
    """Weight of the guidance term at the 0-based ``step``.

    Constant from the first step is the official form; ``linear-decay`` is its line 1 - t/N, which is switched off.
    """
    if training.guidance_schedule == "linear-decay":
        return training.guidance_weight * (1.0 - step / total)
    return training.guidance_weight
