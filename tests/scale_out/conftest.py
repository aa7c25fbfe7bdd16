"""What all executors and all faults are measured by."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scale_out.sweeps import scores, sweep


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The scores of the sweep, computed by two local workers that nothing has disturbed."""
    return scores(sweep(tmp_path_factory.mktemp("reference"), jobs=2))
