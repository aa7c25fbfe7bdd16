"""The toy SAM: quick, seeded, of any size."""

from __future__ import annotations

import pytest
import torch

from cfrbench.contracts import Promptable
from cfrbench_foundation.tiny import TinySam


def build(classes: int = 2, **values: int) -> Promptable:
    return TinySam(TinySam.Config(**values)).build(classes)


@pytest.mark.parametrize(("size", "classes"), [(64, 2), (96, 5), (32, 1)])
@torch.no_grad()
def test_shapes(size: int, classes: int) -> None:
    assert build(classes, input_size=size)(torch.randn(2, 3, size, size)).shape == (2, classes, size // 4, size // 4)


def test_the_seed_decides_the_weights_and_names_them() -> None:
    first, again, other = (build(seed=seed).image_encoder.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])
    identities = {TinySam(TinySam.Config(seed=seed)).identity() for seed in (0, 1)}
    assert len(identities) == 2


def test_the_made_up_checkpoint_leaves_the_random_stream_of_the_run_alone() -> None:
    heads = []
    for seed, toy in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(seed)
        heads.append(build(6, seed=toy).mask_decoder.get_parameter("mask_tokens.weight"))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_positions_matter() -> None:
    encoder = build().image_encoder
    with torch.no_grad():
        embedding = encoder(torch.zeros(1, 3, 64, 64))
    assert embedding.std(dim=(2, 3)).min() > 1e-3
