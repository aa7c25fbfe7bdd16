"""Parity of the intensity curves with the second recording of the official helper (part d of the fine-tuner file)."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cfrbench.intensity import bezier_curve, bezier_map
from tests.golden.ledger import ledger
from tests.golden.official_draws import draw_rising

book = ledger("finetuners")
CURVES = sorted(key.split("/")[1] for key in book.keys("d/") if key.endswith("/points"))
TOLERANCE = 1e-9  # of the file's description


@pytest.mark.parametrize("name", CURVES)
def test_curve(name: str) -> None:
    points = book.take(f"d/{name}/points")
    x, y = bezier_curve(points)
    np.testing.assert_allclose(x[::10_000], book.take(f"d/{name}/raw_x_every_10000"), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(y[::10_000], book.take(f"d/{name}/raw_y_every_10000"), rtol=0, atol=TOLERANCE)
    query = book.take(f"d/{name}/query")
    rising, falling = bezier_map(query, points), bezier_map(query, points, "x")
    np.testing.assert_allclose(rising, book.take(f"d/{name}/increasing"), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(falling, book.take(f"d/{name}/flipped"), rtol=0, atol=TOLERANCE)


def test_transform_after_seeding() -> None:
    query = book.take("d/r2_query")
    bend = draw_rising(random.Random(int(book.take("d/r2_pyseed"))), rate=1.1)
    assert bend is not None
    np.testing.assert_allclose(bezier_map(query, bend.points), book.take("d/r2_prob1"), rtol=0, atol=TOLERANCE)


def test_gates_of_consecutive_calls() -> None:
    (key,) = (key for key in book.keys("d/r2_applied_"))
    applied = book.take(key)
    rate = float(key.rpartition("prob")[2])
    query = book.take("d/r2_query")
    source = random.Random(int(book.take("d/r2_pyseed")))
    bends = [draw_rising(source, rate) for _ in applied]
    changed = [bend is not None and not np.array_equal(bezier_map(query, bend.points), query) for bend in bends]
    assert changed == applied.tolist()
