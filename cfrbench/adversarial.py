"""Adversarial directions: the small change of an image that moves a prediction most (virtual adversarial training).

Sources: Miyato et al., IEEE TPAMI 2019, for the power iteration; ycwu1997/SS-Net code/utils/losses.py for its form on
crops. Images are ``(B, channels, ...)`` with any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def unit(values: Tensor) -> Tensor:
    """Divide each of ``(B, ...)`` by its Euclidean length over everything else, plus 1e-8."""
    everything = tuple(range(1, values.ndim))
    lengths: Tensor = torch.linalg.vector_norm(values, dim=everything, keepdim=True)
    return values / (lengths + 1e-8)


def adversarial_direction(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    target: Tensor,
    start: Tensor,
    distance: Callable[[Tensor, Tensor], Tensor],
    reach: float,
) -> Tensor:
    """Unit direction ``(B, channels, ...)`` in which ``predict(image)`` leaves ``target`` fastest: one power iteration.

    It is the gradient of ``distance(predict(image + reach * d), target)`` in d at ``unit(start)``, a random one.
    Nothing is left in any ``.grad``.
    """
    direction = unit(start).detach().requires_grad_()
    gap = distance(predict(image + reach * direction), target)
    (gradient,) = torch.autograd.grad(gap, direction)
    return unit(gradient)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, no batch norm of ``network`` updates its running statistics; in train mode it still uses the batch's own.

    Layers that track nothing are left alone: switching those back on would make them track from then on.
    """
    tracking = [layer for layer in network.modules() if isinstance(layer, BATCH_NORMS) and layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
