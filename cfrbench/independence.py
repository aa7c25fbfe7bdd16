"""How far one network's filters are mixes of another's: CauSSL's independence measure, and the search for the best mix.

Filters are convolution weights ``(O, ...)``, one row a filter. Sources: Miao et al., CauSSL, ICCV 2023, and
JuzhengMiao/CauSSL utils/losses.py. Everything is computed in float32, under autocast too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: standard deviation of the first coefficients; the cosine does not depend on their scale
START = 1e-3
#: shorter vectors count as this long, as in `torch.nn.functional.normalize`
_SHORT = 1e-12


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


class _Products(NamedTuple):
    """All that `_explained` asks of fixed filters and companions while only coefficients change: inner products.

    A filter has thousands of weights, and there are hundreds of companions at most.
    """

    across: Tensor  # (O, K) filters with companions
    among: Tensor  # (K, K) companions with each other
    lengths: Tensor  # (O,) of the filters

    @classmethod
    def of(cls, filters: Tensor, companions: Tensor) -> _Products:
        rows, others = filters.detach().flatten(1), companions.detach().flatten(1)
        return cls(rows @ others.T, others @ others.T, rows.norm(dim=1))

    def explained(self, coefficients: Tensor) -> Tensor:
        """`_explained` for coefficients ``(O, K)``."""
        inner = (coefficients * self.across).sum(dim=1)
        length = ((coefficients @ self.among) * coefficients).sum(dim=1).clamp_min(_SHORT**2).sqrt()
        return (inner / (length * self.lengths.clamp_min(_SHORT))).square().mean()


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
        with torch.autocast(values.device.type, enabled=False), torch.enable_grad():
            layers = [_Products.of(*layer) for layer in zip(filters, companions, strict=True)]
            for _ in range(steps):
                adam.zero_grad(set_to_none=True)
                parts = zip(layers, self._by_layer(values), strict=True)
                measure = torch.stack([layer.explained(coefficients) for layer, coefficients in parts]).mean()
                measure.backward()  # type: ignore[no-untyped-call]
                adam.step()

    def _by_layer(self, values: Tensor) -> list[Tensor]:
        parts = torch.split(values, [math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
