"""One picture a person understands at once: image, truth, baseline and CFR twin on a slice of a test volume."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrbench.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: colour-blind-safe colours of classes 1, 2, ... (Okabe and Ito)
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
#: the label of pixels where nothing stands
NO_CLASS = 255


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
    index = best_slice(next(iter(masks.values())))
    low, high = np.percentile(image, (1, 99))
    with figure((2.6 * (1 + len(masks)), 3.2), f"{title}, slice {index}", path) as sheet:
        for axis, (name, mask) in zip(sheet.subplots(1, 1 + len(masks)), {"image": None, **masks}.items(), strict=True):
            axis.imshow(image[:, :, index].T, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
            if mask is not None:
                _contours(axis, mask[:, :, index].T)


@dataclass(frozen=True)
class Panel:
    """A canvas ``(S, S)``, or a slice, with truth and prediction on it where there are any; 255 is no class.

    aspect: height of a pixel in widths.
    """

    title: str
    image: NDArray[Any]
    truth: NDArray[Any] | None = None
    prediction: NDArray[Any] | None = None
    aspect: float = 1.0


def draw_canvases(panels: Sequence[Panel], title: str, path: Path, class_names: Sequence[str] = ()) -> None:
    """Write a PNG of canvases, four in a row: predictions as coloured lines, the truth as dashed white ones.

    ``class_names``, background first, explain the colours.
    """
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure((3.4 * columns, 0.5 + 3.6 * rows), title, path) as sheet:
        for axis, panel in zip_longest(sheet.subplots(rows, columns, squeeze=False).flat, panels):
            axis.set_axis_off()
            if panel is None:
                continue
            low, high = np.percentile(panel.image, (1, 99))
            axis.imshow(panel.image, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=panel.aspect)
            axis.set_title(panel.title, fontsize=9)
            if panel.prediction is not None:
                _contours(axis, panel.prediction)
            if panel.truth is not None:
                _contours(axis, panel.truth, dashed=True)
        if class_names:
            _legend(sheet, class_names)


def _legend(sheet: Any, class_names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=COLOURS[n % len(COLOURS)], label=name) for n, name in enumerate(class_names[1:])]
    sheet.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), fontsize=8)


@contextmanager
def figure(size: tuple[float, float], title: str, path: Path) -> Iterator[Any]:
    """A matplotlib figure that is written to ``path`` as PNG; equal drawings give equal bytes.

    UsageError if ``path`` is named as something else.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"The picture {path} would be a PNG. Give a name that ends in .png with -o.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sheet = plt.figure(figsize=size, layout="constrained")
    sheet.suptitle(textwrap.fill(title, int(14 * size[0])), fontsize=9)  # about 14 letters of this size an inch
    try:
        yield sheet
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.savefig(path, dpi=110, metadata={"Software": None})
    finally:
        plt.close(sheet)


def _contours(axis: Any, mask: NDArray[Any], *, dashed: bool = False) -> None:
    """A line around each class: coloured, or white dashes that show on any brightness."""
    from matplotlib.patheffects import withStroke

    for number in np.unique(mask[(mask > 0) & (mask != NO_CLASS)]):
        layer = np.asarray(mask == number, dtype=float)
        if dashed:
            lines = axis.contour(layer, levels=[0.5], colors="white", linewidths=0.9, linestyles="dashed")
            lines.set_path_effects([withStroke(linewidth=1.9, foreground="black")])
        else:
            axis.contour(layer, levels=[0.5], colors=COLOURS[(number - 1) % len(COLOURS)], linewidths=1.4)
