"""Finds the calls of the two-stream sampler that give stored batches; the files do not store all arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.sampling import two_stream_epoch

Batches = NDArray[np.integer[Any]]


def sampler_setups(epochs: Sequence[Batches], seeds: Iterable[int]) -> list[tuple[int, int, int]]:
    """Every (seed, labelled cases, all cases) whose successive epochs are exactly ``epochs`` of shape (batches, size).

    Labelled cases are 0, 1, ..., the unlabelled ones follow. A hit by chance is out of the question: each epoch is an
    ordered draw of most of the labelled and many of the unlabelled cases.
    """
    whole = np.concatenate(epochs)
    splits = [i for i in range(1, whole.shape[1]) if whole[:, :i].max() < whole[:, i:].min()]
    return [setup for split in splits for setup in _setups(epochs, whole, split, seeds)]


def _setups(epochs: Sequence[Batches], whole: Batches, split: int, seeds: Iterable[int]) -> list[tuple[int, int, int]]:
    labelled_counts = range(int(whole[:, :split].max()) + 1, int(whole[:, split:].min()) + 1)
    totals = range(int(whole.max()) + 1, int(whole.max()) + 65)
    return [
        (seed, labelled, total)
        for seed, labelled in product(seeds, labelled_counts)
        if _starts_with(seed, labelled, epochs[0][:, :split])
        for total in totals
        if _gives(np.random.RandomState(seed), labelled, total, split, epochs)
    ]


def _starts_with(seed: int, labelled: int, firsts: Batches) -> bool:
    order = np.random.RandomState(seed).permutation(labelled)
    return bool(np.array_equal(order[: firsts.size], firsts.ravel()))


def _gives(rng: np.random.RandomState, labelled: int, total: int, split: int, epochs: Sequence[Batches]) -> bool:
    size = epochs[0].shape[1] - split
    for batches in epochs:
        ours = two_stream_epoch(range(labelled), range(labelled, total), split, size, rng)
        if not np.array_equal([first + second for first, second in ours], batches):
            return False
    return True
