"""Small hand-made score frames for the tests of reports."""

from __future__ import annotations

from typing import Any

import pandas as pd

from cfrbench.report.frames import tidy

LA = {"dataset": "la", "concat": "grid", "model": "lite-medsam", "tune": "lora", "net": "vnet"}


FACTS = {
    "title": "Left atrium", "synthetic": False, "train_cases": 20, "preset": "quick", "model": "lite-medsam",
    "model_title": "LiteMedSAM", "model_note": "The weights may have seen LA.", "unit": "voxel",
    "protocol": "900 steps", "split": "",
}  # fmt: skip


def cell(ssl: str, variant: str, labels: int, unlabelled: int, **other: Any) -> dict[str, Any]:
    """A cell of the LA sweep; ``other`` replaces data set, strategy, seed and so on."""
    known = {"ssl": ssl, "title": ssl.upper(), "variant": variant, "labels": labels, "unlabelled": unlabelled}
    return {**LA, "seed": 0, **known, **other}


def scores(dice: list[float], name: str = "left atrium", empty: str = "") -> pd.DataFrame:
    """One class, one row per case; the other metrics follow from Dice so that rows differ."""
    rows = [
        {"case": f"c{i}", "class": name, "dice": d, "jaccard": d - 10, "asd": 3.5, "hd95": 100 - d, "empty": empty}
        for i, d in enumerate(dice)
    ]
    return pd.DataFrame(rows)


def la_sweep() -> pd.DataFrame:
    """Bounds, MT and its twin, pseudo-labels; two seeds one point apart; one empty prediction of MT per seed."""
    frames = []
    for seed in (0, 1):
        missed = scores([30.0 + seed, 35.0 + seed, 0.0])
        missed.loc[2, "empty"] = "prediction"
        guided = scores([70.0 + seed, 74.0 + seed, 78.0 + seed])
        frames += [
            tidy(guided, cell("mt", "cfr", 1, 19, seed=seed)),
            tidy(scores([70.0, 72.0]), cell("lite-medsam+lora", "pseudo-label", 1, 19, seed=seed)),
            tidy(missed, cell("mt", "baseline", 1, 19, seed=seed)),
            tidy(scores([86.0, 87.0, 88.0]), cell("supervised", "baseline", 20, 0, seed=seed)),
            tidy(scores([10.0, 20.0, 30.0]), cell("supervised", "baseline", 1, 0, seed=seed)),
        ]
    return pd.concat(frames, ignore_index=True)


def study() -> pd.DataFrame:
    """Eight cases, three seeds, two organs, MT and ACMT with their twins and a bound; every number by formula."""
    frames = []
    for seed in range(3):
        for place, (ssl, variant) in enumerate(
            [("mt", "baseline"), ("mt", "cfr"), ("acmt", "baseline"), ("acmt", "cfr")]
        ):
            lift = 18.0 * (variant == "cfr") + 4.0 * (ssl == "acmt" and variant == "baseline")
            for organ, level in (("spleen", 62.0), ("gallbladder", 41.0)):
                dice = [level + lift + 2.5 * case % 7 + (case * (place + 2) + seed) % 5 for case in range(8)]
                frames.append(tidy(scores(dice, organ), cell(ssl, variant, 1, 19, seed=seed)))
        frames.append(
            tidy(scores([55.0 + case for case in range(8)], "spleen"), cell("supervised", "baseline", 1, 0, seed=seed))
        )
    return pd.concat(frames, ignore_index=True)
