"""How unsure a network is: many passes through its dropout, or through noise, and their mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def mean_probability(network: Callable[[Tensor], Tensor], image: Tensor, passes: int) -> Tensor:
    """Return the mean softmax ``(B, C, ...)`` of an even number of random ``passes`` over ``image`` ``(B, 1, ...)``.

    Two passes are made at a time, over a batch that holds the images twice, so batch norm sees 2B crops
    (yulequan/UA-MT code/train_LA_meanteacher_certainty_unlabel.py: T = 8 as four passes). ``network`` maps images to
    logits and adds its own noise.
    """
    twice = torch.cat([image, image])
    total: Tensor | None = None
    for _ in range(passes // 2):
        first, second = network(twice).float().softmax(dim=1).chunk(2)
        total = first + second if total is None else total.add_(first).add_(second)
    if total is None:
        raise ValueError(f"an even number of passes above 0 is needed, not {passes}")
    return total.div_(2 * (passes // 2))


@torch.no_grad()
def deviation_and_features(
    network: Callable[[Tensor], tuple[Tensor, Tensor]], image: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """Standard deviation ``(B, C, ...)`` over ``passes`` of ``sigmoid(logits / 2)`` (by n - 1), and mean features.

    ``network`` maps images to logits and features of any level; its dropout makes the passes differ
    (lemoshu/AC-MT code/train_ACMT_PErr_3D.py). The sums run pass by pass, so memory does not grow with them.
    """
    logits, features = network(image)
    mean, features = (logits.float() / 2).sigmoid(), features.float()
    squares = torch.zeros_like(mean)
    for done in range(1, passes):
        logits, more = network(image)
        features = features + more.float()
        value = (logits.float() / 2).sigmoid()
        step = value - mean
        mean = mean + step / (done + 1)
        squares += step * (value - mean)
    return (squares / (passes - 1)).sqrt(), features / passes
