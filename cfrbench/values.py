"""The values that plug-ins and the core exchange; `cfrbench.contracts` has them under their usual address.

Shapes: B batch, C classes (background first), ``(H, W, D)`` a crop or volume with slices last, S side of a canvas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cfrbench.config import Triple


@dataclass(frozen=True)
class Layout:
    """Where each voxel of a volume stands on the canvases; everything the inverse needs. Strategies extend it."""

    shape: Triple
    canvas: int  # side S in pixels, as `ConcatStrategy.canvas_side` says
    count: int = 1  # canvases per volume


@dataclass(frozen=True)
class Batch:
    """One training batch: labelled crops first, then unlabelled ones.

    image ``(L + U, 1, H, W, D)`` float; label ``(L, H, W, D)`` uint8; pseudo ``(U, H, W, D)`` uint8 pseudo-labels that
    move with their images through every mix, or None in a baseline; own ``(U, H, W, D)`` uint8 labels that the method
    itself gave to whole volumes (`SSLMethod.labeller`). There is no label of an unlabelled crop in here.
    """

    image: Tensor
    label: Tensor
    pseudo: Tensor | None = None
    own: Tensor | None = None

    @property
    def labelled(self) -> int:
        """L, the number of labelled crops."""
        return self.label.shape[0]


@dataclass(frozen=True)
class Progress:
    """Where training stands: 0-based ``step`` before its update, of ``total``; the same inside the current phase."""

    step: int
    total: int
    phase: int = 0
    phase_step: int = 0
    phase_total: int = 0
    part: int = 0  # of the batches whose gradients are summed up before the update


@dataclass(frozen=True)
class StepOutput:
    """What a step teaches: named, already weighted scalar losses whose sum is minimised.

    guided: the logits ``(U, C, H, W, D)`` on the unlabelled crops, one per network, to which guidance may be added. A
    pass that only guidance needs may be left out where ``batch.pseudo`` is None.
    guided_pseudo: where the method mixed or moved its crops, ``batch.pseudo`` mixed and moved alike, ``(N, H, W, D)``
    for guided logits ``(N, C, H, W, D)``; voxels labelled 255 come from elsewhere and are not guided.
    masks: by loss name, the voxels ``(N, 1 or C, H, W, D)`` of the last N crops that this loss counts, if not all.
    """

    losses: dict[str, Tensor]
    guided: tuple[Tensor, ...] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    guided_pseudo: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """A part of training with its own learning-rate schedule; ``share`` is its weight among all phases."""

    name: str
    share: float = 1.0


@dataclass(frozen=True)
class StageTask:
    """One stage to run: ``key`` is the hash of ``recipe``; ``needs`` are the keys of the stages it reads."""

    stage: str
    key: str
    title: str
    needs: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
