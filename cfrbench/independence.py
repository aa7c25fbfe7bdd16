"""How far one network's filters are mixes of another's: CauSSL's independence measure, and the search for the best mix.

Filters are convolution weights ``(O, ...)``, one row a filter. Sources: Miao et al., CauSSL, ICCV 2023, and
JuzhengMiao/CauSSL utils/losses.py. Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: standard deviation of the first coefficients; the cosine does not depend on their scale
START = 1e-3


def dependence(filters: Sequence[Tensor], companions: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """Mean over layers, and over the filters of each, of ``cos^2(filter, its mix of companions)``: 0 if independent.

    By layer: filters ``(O, ...)``, companions ``(K, ...)`` of equal length, coefficients ``(O, K)``. Gradients reach
    filters and coefficients, never companions.
    """
    with torch.autocast(filters[0].device.type, enabled=False):
        layers = [_explained(*layer) for layer in zip(filters, companions, coefficients, strict=True)]
        return torch.stack(layers).mean()


def _explained(filters: Tensor, companions: Tensor, coefficients: Tensor) -> Tensor:
    mixed = coefficients @ companions.detach().flatten(1)
    cosines = (F.normalize(mixed, dim=1) * F.normalize(filters.flatten(1), dim=1)).sum(dim=1)
    return cosines.square().mean()


class Mixture(nn.Module):
    """The coefficients by layer that mix filters from companions, and the state of the Adam that finds them.

    All of it lives in buffers: the optimiser of the networks must not train it, and training resumes bit for bit.
    """

    values: Tensor
    first_moment: Tensor
    second_moment: Tensor
    updates: Tensor

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._shapes = tuple(shapes)
        count = sum(math.prod(shape) for shape in shapes)
        self.register_buffer("values", START * torch.randn(count))
        self.register_buffer("first_moment", torch.zeros(count))
        self.register_buffer("second_moment", torch.zeros(count))
        self.register_buffer("updates", torch.zeros(()))

    def dependence(self, filters: Sequence[Tensor], companions: Sequence[Tensor]) -> Tensor:
        """`dependence` with the coefficients found so far, which get no gradient."""
        return dependence(filters, companions, self._by_layer(self.values))

    def search(self, filters: Sequence[Tensor], companions: Sequence[Tensor], steps: int, rate: float) -> None:
        """Raise the measure by ``steps`` of Adam on the coefficients; neither filters nor companions change."""
        values = nn.Parameter(self.values)  # shares the buffer's memory, as the moments do: Adam works in place
        adam = torch.optim.Adam([values], lr=rate, maximize=True, foreach=False)
        adam.state[values] = {"step": self.updates, "exp_avg": self.first_moment, "exp_avg_sq": self.second_moment}
        fixed = [layer.detach() for layer in filters]
        for _ in range(steps):
            adam.zero_grad(set_to_none=True)
            with torch.enable_grad():
                dependence(fixed, companions, self._by_layer(values)).backward()  # type: ignore[no-untyped-call]
            adam.step()

    def _by_layer(self, values: Tensor) -> list[Tensor]:
        parts = torch.split(values, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
