"""Runs last of the golden tests: every array was asserted or stands in an allow-list with its reason."""

from __future__ import annotations

import pytest

from tests.golden.ledger import FAMILIES, ledger


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_is_asserted_or_excused(family: str) -> None:
    book = ledger(family)
    assert book.used, f"no golden test of {family} ran"
    assert book.forgotten() == []
