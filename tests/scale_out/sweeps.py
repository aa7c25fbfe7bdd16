"""The sweep that every executor is given, and what two runs of it must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cfrbench
from cfrbench.sweep import Result

#: 12 cells: baseline, CFR twin and pseudo-labels at four budgets
REQUEST: dict[str, Any] = {
    "preset": "smoke", "ssl": ("mt",), "labels": (1, 2, 3, 4), "bounds": False,
    "set": {"compute.threads": 1, "data.phantom.train": 6, "data.phantom.test": 2,
            "data.phantom.shape": [24, 24, 16], "training.patch": [16, 16, 16]},
}  # fmt: skip


def sweep(store: Path, executor: str = "local", jobs: int = 1, **options: Any) -> Result:
    """Run the sweep; ``options`` are those of the executor."""
    settings = REQUEST["set"] | {f"executor.{executor}.{name}": value for name, value in options.items()}
    return cfrbench.run(store=store, executor=executor, jobs=jobs, **{**REQUEST, "set": settings})


def scores(result: Result) -> list[dict[str, Any]]:
    """Every score of every case, bit for bit, in an order of its own."""
    assert not result.failures, result.failures
    frame = result.cases
    columns = sorted(name for name in frame.columns if name not in ("seconds",))
    rows: list[dict[str, Any]] = frame[columns].sort_values(columns).to_dict("records")
    assert len({(row["variant"], row["labels"]) for row in rows}) == 12
    return rows
