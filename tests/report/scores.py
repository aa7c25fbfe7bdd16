"""Small hand-made score frames for the tests of reports."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cfrbench.report.frames import tidy

LA = {"dataset": "la", "concat": "grid", "model": "lite-medsam", "tune": "lora", "net": "vnet"}


def cell(ssl: str, title: str, variant: str, labels: int, unlabelled: int, **other: Any) -> dict[str, Any]:
    """A cell of the LA sweep; ``other`` replaces data set, strategy and so on."""
    return {
        **LA, "ssl": ssl, "title": title, "variant": variant, "labels": labels, "unlabelled": unlabelled, **other
    }  # fmt: skip


def scores(dice: list[float], name: str = "left atrium", empty: str = "") -> list[dict[str, Any]]:
    """One class, one row per case; the other metrics follow from Dice so that rows differ."""
    return [
        {"case": f"c{i}", "class": name, "dice": d, "jaccard": d - 10, "asd": 3.5, "hd95": 100 - d, "empty": empty}
        for i, d in enumerate(dice)
    ]


def la_sweep() -> pd.DataFrame:
    """Bounds, MT and its twin, pseudo-labels; two seeds one point apart; one empty prediction of MT per seed."""
    frames = []
    for seed in (0, 1):
        mt = [*scores([30.0 + seed, 35.0 + seed]), scores([0.0, 0.0, 0.0], empty="prediction")[2]]
        frames += [
            tidy(cell("mt", "MT", "cfr", 1, 19), seed, scores([70.0 + seed, 74.0 + seed, 78.0 + seed])),
            tidy(cell("none", "LiteMedSAM + LoRA", "pseudo-label", 1, 19), seed, scores([70.0, 72.0])),
            tidy(cell("mt", "MT", "baseline", 1, 19), seed, mt),
            tidy(cell("supervised", "Supervised", "baseline", 20, 0), seed, scores([86.0, 87.0, 88.0])),
            tidy(cell("supervised", "Supervised", "baseline", 1, 0), seed, scores([10.0, 20.0, 30.0])),
        ]
    return pd.concat(frames, ignore_index=True)
