"""One picture a person understands at once: image, truth, baseline and CFR twin on a slice of a test volume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrbench.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: colour-blind-safe colours of classes 1, 2, ... (Okabe and Ito)
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def median_gain_case(cases: pd.DataFrame, ssl: str, labels: int, seed: int) -> str:
    """The test case whose Dice gain is the median one (the lower of two): chosen by rule, not by hand."""
    rows = cases[(cases["ssl"] == ssl) & (cases["labels"] == labels) & (cases["seed"] == seed)]
    rows = rows[(rows["metric"] == "dice") & rows["variant"].isin(["baseline", "cfr"])]
    means = rows.groupby(["case", "variant"])["value"].mean().unstack()
    if means.empty or list(means.columns) != ["baseline", "cfr"]:
        raise UsageError(f"The run has no baseline and CFR twin of {ssl} with {labels} labels and seed {seed}. Choose "
                         "--ssl, --labels and --seed of a finished pair.")  # fmt: skip
    gains = (means["cfr"] - means["baseline"]).sort_values(kind="stable")
    return str(gains.index[(len(gains) - 1) // 2])


def best_slice(truth: NDArray[Any]) -> int:
    """The slice of ``(H, W, D)`` with most labelled voxels."""
    return int((truth > 0).sum(axis=(0, 1)).argmax())


def draw(image: NDArray[Any], masks: Mapping[str, NDArray[Any]], title: str, path: Path) -> None:
    """Write a PNG: the slice of ``image`` alone, then with the contours of each mask; all ``(H, W, D)``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    index = best_slice(next(iter(masks.values())))
    low, high = np.percentile(image, (1, 99))
    figure, axes = plt.subplots(1, 1 + len(masks), figsize=(2.6 * (1 + len(masks)), 3.2), layout="constrained")
    for axis, (name, mask) in zip(axes, {"image": None, **masks}.items(), strict=True):
        axis.imshow(image[:, :, index].T, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        if mask is not None:
            _contours(axis, mask[:, :, index].T)
    figure.suptitle(f"{title}, slice {index}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _contours(axis: Any, mask: NDArray[Any]) -> None:
    for number in range(1, 1 + int(mask.max())):
        layer = np.asarray(mask == number, dtype=float)
        if layer.any():
            axis.contour(layer, levels=[0.5], colors=COLOURS[(number - 1) % len(COLOURS)], linewidths=1.4)
