"""The measure of how far filters are mixes of others, and the search for the best mix."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from cfrbench.independence import Mixture, dependence


def random_filters(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def test_the_measure_against_a_plain_spelling() -> None:
    filters = random_filters([(3, 2, 3, 3, 3), (2, 4, 1, 1, 1)], seed=0)
    companions = random_filters([(5, 2, 3, 3, 3), (4, 4, 1, 1, 1)], seed=1)
    coefficients = random_filters([(3, 5), (2, 4)], seed=2)
    means = []
    for own, others, matrix in zip(filters, companions, coefficients, strict=True):
        squares = []
        for row, mix in zip(own, matrix, strict=True):
            mixed = torch.stack([share * other for share, other in zip(mix, others, strict=True)]).sum(0)
            squares.append(float((mixed * row).sum() / (mixed.norm() * row.norm())) ** 2)
        means.append(sum(squares) / len(squares))
    measure = float(dependence(filters, companions, coefficients))
    assert measure == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_the_search_raises_the_measure_and_leaves_the_filters_alone() -> None:
    torch.manual_seed(0)
    filters = [nn.Parameter(layer) for layer in random_filters([(4, 2, 3, 3, 3), (3, 4, 1, 1, 1)], seed=0)]
    companions = random_filters([(8, 2, 3, 3, 3), (6, 4, 1, 1, 1)], seed=1)
    before = [layer.detach().clone() for layer in filters]
    mixture = Mixture([(4, 8), (3, 6)])
    found = [float(mixture.dependence(filters, companions).detach())]
    for _ in range(4):
        mixture.search(filters, companions, steps=60, rate=0.02)
        found.append(float(mixture.dependence(filters, companions).detach()))
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.1
    assert all(map(torch.equal, before, filters))
    assert all(layer.grad is None for layer in filters)
    assert not list(mixture.parameters())
    assert int(mixture.updates) == 240


def test_the_search_equals_plain_adam_on_the_measure() -> None:
    torch.manual_seed(0)
    shapes = [(4, 2, 3, 3, 3), (3, 4, 1, 1, 1)]
    filters, companions = random_filters(shapes, seed=0), random_filters([(8, *shapes[0][1:]), (6, *shapes[1][1:])], 1)
    mixture = Mixture([(4, 8), (3, 6)])
    plain = [part.clone().requires_grad_() for part in mixture._by_layer(mixture.values)]
    adam = torch.optim.Adam(plain, lr=0.02, maximize=True)
    for _ in range(60):
        adam.zero_grad()
        dependence(filters, companions, plain).backward()
        adam.step()
    mixture.search(filters, companions, steps=60, rate=0.02)
    found = torch.cat([part.detach().flatten() for part in plain])
    torch.testing.assert_close(mixture.values, found, rtol=0, atol=1e-5)


def test_the_search_finds_filters_that_are_mixes() -> None:
    (companions,) = random_filters([(3, 9)], seed=0)
    filters = [companions[:1] - 2.0 * companions[1:2]]
    mixture = Mixture([(1, 3)])
    mixture.search(filters, [companions], steps=300, rate=0.02)
    assert float(mixture.dependence(filters, [companions])) > 0.999


def test_the_measure_is_float32_under_autocast() -> None:
    filters, companions = random_filters([(4, 2, 3, 3, 3)], seed=0), random_filters([(4, 2, 3, 3, 3)], seed=1)
    coefficients = random_filters([(4, 4)], seed=2)
    exact = dependence(filters, companions, coefficients)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dependence(filters, companions, coefficients), exact)
