"""The laws of crops and batches: fast equals official, and everything is a function of (seed, stream, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench import sampling
from cfrbench.config import Triple
from cfrbench.errors import DataError

SIDES = st.tuples(*[st.integers(1, 14)] * 3)
SEEDS = st.integers(0, 2**32 - 1)


def numbered(shape: Triple) -> Tensor:
    """A volume whose voxels all differ and none is 0, the value of padding."""
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).view(shape)


def numpy_crop(volume: np.ndarray, patch: Triple, draw: sampling.CropDraw) -> np.ndarray:
    """The official order in numpy: rotate and flip the whole volume, pad it, cut."""
    if draw.axis is not None:
        volume = np.flip(np.rot90(volume, draw.turns), draw.axis)
    if any(side <= length for side, length in zip(volume.shape, patch, strict=True)):
        ends = [max((n - s) // 2 + 3, 0) for s, n in zip(volume.shape, patch, strict=True)]
        volume = np.pad(volume, [(end, end) for end in ends])
    (x, y, z), (h, w, d) = draw.start, patch
    return volume[x : x + h, y : y + w, z : z + d]


@given(SIDES, SIDES, st.booleans(), SEEDS)
@settings(max_examples=300, deadline=None)
def test_cropping_first_is_the_official_order_bit_for_bit(
    shape: Triple, patch: Triple, rotflip: bool, seed: int
) -> None:
    draw = sampling.draw_crop(shape, patch, rotflip, np.random.default_rng(seed))
    volume = numbered(shape)
    crop = sampling.take_crop(volume, draw)
    assert list(crop.shape) == list(patch)
    assert np.array_equal(crop, numpy_crop(volume.numpy(), patch, draw))
    slow = sampling.random_crop(sampling.rotflip(volume, draw.turns, draw.axis), patch, draw.start)
    assert torch.equal(crop, slow)


@given(SIDES, SIDES, SEEDS)
@settings(max_examples=50, deadline=None)
def test_image_and_label_stay_together(shape: Triple, patch: Triple, seed: int) -> None:
    image = numbered(shape)
    label = (image % 3).to(torch.uint8)
    draw = sampling.draw_crop(shape, patch, True, np.random.default_rng(seed))
    crop = sampling.take_crop(label, draw)
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, (sampling.take_crop(image, draw) % 3).to(torch.uint8))


def test_leading_axes_are_kept() -> None:
    volume = torch.randn(2, 3, 9, 8, 7)
    draw = sampling.draw_crop((9, 8, 7), (4, 5, 9), True, np.random.default_rng(3))
    crop = sampling.take_crop(volume, draw)
    assert crop.shape == (2, 3, 4, 5, 9)
    assert torch.equal(crop[1, 2], sampling.take_crop(volume[1, 2], draw))


def test_a_volume_of_another_shape_is_refused() -> None:
    draw = sampling.draw_crop((9, 8, 7), (4, 4, 4), False, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"\(9, 8, 7\).*\(8, 9, 7\)"):
        sampling.take_crop(torch.zeros(8, 9, 7), draw)


@given(st.integers(-4, 7), st.sampled_from([None, 0, 1]))
def test_rotflip_is_numpys_quarter_turn_then_flip(turns: int, axis: int | None) -> None:
    volume = numbered((3, 4, 2))
    expected = np.rot90(volume.numpy(), turns)
    expected = expected if axis is None else np.flip(expected, axis)
    assert np.array_equal(sampling.rotflip(volume, turns, axis), expected)


def test_padding_follows_the_official_rule() -> None:
    assert sampling.padding((12, 11, 10), (11, 10, 9)) == (0, 0, 0)
    assert sampling.padding((11, 10, 9), (11, 10, 9)) == (3, 3, 3)
    assert sampling.padding((15, 16, 4), (11, 11, 9)) == (1, 0, 5)


def test_starts_reach_every_place_but_the_last() -> None:
    rng = np.random.default_rng(0)
    starts = {sampling.draw_crop((9, 8, 7), (4, 4, 4), False, rng).start for _ in range(2000)}
    assert {x for x, _, _ in starts} == set(range(5))
    assert {y for _, y, _ in starts} == set(range(4))
    assert {z for _, _, z in starts} == set(range(3))


def test_all_turns_and_both_flips_are_drawn_equally_often() -> None:
    rng = np.random.default_rng(0)
    draws = Counter(
        (d.turns, d.axis) for d in (sampling.draw_crop((9, 8, 7), (4, 4, 4), True, rng) for _ in range(4000))
    )
    assert set(draws) == {(turns, axis) for turns in range(4) for axis in (0, 1)}
    assert min(draws.values()) > 400
    plain = [sampling.draw_crop((9, 8, 7), (4, 4, 4), False, rng) for _ in range(20)]
    assert {(draw.turns, draw.axis) for draw in plain} == {(0, None)}


@given(SIDES, SIDES)
@settings(deadline=None)
def test_the_centre_crop_is_in_the_middle(shape: Triple, patch: Triple) -> None:
    crop = sampling.center_crop(torch.ones(shape), patch)
    assert list(crop.shape) == list(patch)
    expected = np.prod([min(side, length) for side, length in zip(shape, patch, strict=True)])
    assert int(crop.sum()) == expected


# ---------------------------------------------------------------------------------------------------------------------


def test_generators_depend_on_seed_stream_and_step_alone() -> None:
    def numbers(seed: int, stream: str, step: int) -> list[int]:
        return [int(n) for n in sampling.generator(seed, stream, step).integers(2**62, size=4)]

    keys = [(0, "crop", 0), (1, "crop", 0), (0, "crop", 1), (0, "noise", 0), (10, "crop", 0), (0, "crop/0", 0)]
    assert len({tuple(numbers(*key)) for key in keys}) == len(keys)
    assert numbers(5, "crop", 7) == numbers(5, "crop", 7)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.integers(0, 4), SEEDS)
@settings(deadline=None)
def test_an_epoch_is_one_pass_over_the_labelled_cases(
    labelled: int, unlabelled: int, labelled_batch: int, unlabelled_batch: int, seed: int
) -> None:
    first, second = list(range(labelled)), list(range(labelled, labelled + unlabelled))
    epoch = sampling.two_stream_epoch(first, second, labelled_batch, unlabelled_batch, np.random.default_rng(seed))
    assert len(epoch) == max(labelled // labelled_batch, 1)
    drawn = [case for cases, _ in epoch for case in cases]
    assert len(drawn) == len(epoch) * labelled_batch
    if labelled >= labelled_batch:
        assert len(set(drawn)) == len(drawn)
    else:
        assert set(drawn) == set(first)
    for _, cases in epoch:
        assert len(cases) == (unlabelled_batch if unlabelled else 0)
        assert set(cases) <= set(second)
    stream = [case for _, cases in epoch for case in cases]
    assert all(
        sorted(stream[i : i + unlabelled]) == second for i in range(0, len(stream) - unlabelled + 1, unlabelled or 1)
    )


def test_batches_are_a_pure_function_of_the_step() -> None:
    def batch(step: int, seed: int = 0) -> tuple[list[int], list[int]]:
        return sampling.two_stream_batch(step, range(5), range(5, 20), 2, 2, seed)

    there, back = [batch(step) for step in range(40)], [batch(step) for step in reversed(range(40))]
    assert there == back[::-1]
    assert there != [batch(step, seed=1) for step in range(40)]
    epochs = [there[i] + there[i + 1] for i in range(0, 40, 2)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 15
    assert {case for _, cases in there for case in cases} == set(range(5, 20))


def test_one_labelled_case_fills_the_labelled_half() -> None:
    labelled, unlabelled = sampling.two_stream_batch(3, [7], [1, 2, 3], 2, 2, 0)
    assert labelled == [7, 7]
    assert len(set(unlabelled)) == 2


def test_batches_without_unlabelled_cases() -> None:
    assert sampling.two_stream_batch(0, [4, 5], [], 2, 2, 0)[1] == []
    assert sampling.two_stream_batch(0, [4, 5], [6], 2, 0, 0)[1] == []


def test_batches_without_labelled_cases_are_refused() -> None:
    with pytest.raises(DataError, match="no labelled case"):
        sampling.two_stream_batch(0, [], [1], 2, 2, 0)
