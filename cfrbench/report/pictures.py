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
#: sizes of letters as journals print them; letters in a PDF stay letters
STYLE: dict[Any, Any] = {
    "savefig.dpi": 160, "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "pdf.fonttype": 42, "axes.linewidth": 0.7,
}  # fmt: skip
#: what would make two files of one drawing differ: program and date
UNDATED: dict[str, dict[str, None]] = {
    ".png": {"Software": None}, ".pdf": {"Creator": None, "Producer": None, "CreationDate": None}
}  # fmt: skip


def gains_of_cases(cases: pd.DataFrame, ssl: Sequence[str], labels: int, seed: int) -> pd.Series[float]:
    """The Dice gain of each test case, lowest first: guided minus unguided, mean over classes and ``ssl`` methods.

    UsageError if the run has no such pair.
    """
    rows = cases[cases["ssl"].isin(ssl) & (cases["labels"] == labels) & (cases["seed"] == seed)]
    rows = rows[(rows["metric"] == "dice") & rows["variant"].isin(["baseline", "cfr"])]
    means = rows.groupby(["case", "variant"])["value"].mean().unstack()
    if means.empty or list(means.columns) != ["baseline", "cfr"]:
        raise UsageError(f"The run has no baseline and CFR twin of {' or '.join(ssl)} with {labels} labels and seed "
                         f"{seed}. Choose --ssl, --labels and --seed of a finished pair.")  # fmt: skip
    return (means["cfr"] - means["baseline"]).sort_values(kind="stable")


def median_gain_case(cases: pd.DataFrame, ssl: str, labels: int, seed: int) -> str:
    """The test case whose Dice gain is the median one (the lower of two): chosen by rule, not by hand."""
    gains = gains_of_cases(cases, [ssl], labels, seed)
    return str(gains.index[(len(gains) - 1) // 2])


def telling_cases(values: pd.Series[float]) -> dict[str, str]:
    """Case -> ``best``, ``median`` or ``worst`` of ``values`` (lowest first); fewer where there are fewer cases."""
    places = {"best": len(values) - 1, "median": (len(values) - 1) // 2, "worst": 0}
    found: dict[str, str] = {}
    for word, place in places.items():
        found.setdefault(str(values.index[place]), word)
    return found


def telling_slice(truth: NDArray[Any], masks: Sequence[NDArray[Any]]) -> int:
    """The slice of ``(H, W, D)`` on which ``masks`` are most unlike each other, among those with much of the truth.

    Much is half of what `best_slice` shows, which is the answer where all masks agree.
    """
    areas = (truth > 0).sum(axis=(0, 1))
    unlike = np.zeros(truth.shape, bool)
    for mask in masks[1:]:
        unlike |= mask != masks[0]
    counts = unlike.sum(axis=(0, 1)) * (2 * areas >= areas.max())
    return int(counts.argmax()) if counts.any() else best_slice(truth)


def best_slice(truth: NDArray[Any]) -> int:
    """The slice of ``(H, W, D)`` with most labelled voxels."""
    return int((truth > 0).sum(axis=(0, 1)).argmax())


@dataclass(frozen=True)
class Panel:
    """An image ``(A, B)`` with the truth on it and, if there is one, a prediction; 255 is no class."""

    title: str
    image: NDArray[Any]
    truth: NDArray[Any] | None = None
    prediction: NDArray[Any] | None = None
    #: grey values shown as black and as white; None = percentiles 1 and 99 of the image
    window: tuple[float, float] | None = None
    #: height of a pixel in widths
    aspect: float = 1.0


def draw(image: NDArray[Any], masks: Mapping[str, NDArray[Any]], title: str, path: Path) -> None:
    """Write a PNG: the slice of ``image`` alone, then with the contours of each mask; all ``(H, W, D)``."""
    index = best_slice(next(iter(masks.values())))
    low, high = np.percentile(image, (1, 99))
    height = 2.6 * image.shape[1] / image.shape[0]
    with figure((2.6 * (1 + len(masks)), 0.6 + height), f"{title}, slice {index}", path) as sheet:
        for axis, (name, mask) in zip(sheet.subplots(1, 1 + len(masks)), {"image": None, **masks}.items(), strict=True):
            shown = None if mask is None else mask[:, :, index].T
            _show(axis, Panel(name, image[:, :, index].T, None, shown, (float(low), float(high))))


def draw_canvases(panels: Sequence[Panel], title: str, path: Path, class_names: Sequence[str] = ()) -> None:
    """Write a PNG of canvases, four in a row: predictions as coloured lines, the truth as dashed white ones.

    ``class_names``, background first, explain the colours.
    """
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with figure((3.4 * columns, 0.5 + 3.6 * rows), title, path) as sheet:
        for axis, panel in zip_longest(sheet.subplots(rows, columns, squeeze=False).flat, panels):
            axis.set_axis_off()
            if panel is not None:
                _show(axis, panel)
        if class_names:
            lines = _class_lines(len(class_names) - 1)
            sheet.legend(lines, class_names[1:], loc="outside lower center", ncols=min(len(lines), 5), frameon=False)


def draw_montage(rows: Mapping[str, Sequence[Panel]], title: str, path: Path, classes: Sequence[str] = ()) -> None:
    """Write a montage: a row of panels for each case, named on its left; lines as in `draw_canvases`.

    ``classes`` are named below if there are several.
    """
    columns = max(map(len, rows.values()))
    side = min(1.5, 11 / columns)  # inches: two columns of a journal hold eight panels
    with figure((0.3 + side * columns, 0.35 + (side + 0.3) * len(rows)), title, path) as sheet:
        for axes, (name, panels) in zip(sheet.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
            for axis, panel in zip_longest(axes, panels):
                axis.set_axis_off()
                if panel is not None:
                    _show(axis, panel, size=7)
            beside = {"transform": axes[0].transAxes, "rotation": 90, "va": "center", "ha": "right"}
            axes[0].text(-0.06, 0.5, name, fontsize=7, **beside)
        if len(classes) > 1:
            sheet.legend(_class_lines(len(classes)), classes, loc="outside lower center", ncols=7, frameon=False)


def _show(axis: Any, panel: Panel, size: int = 9) -> None:
    low, high = panel.window or np.percentile(panel.image, (1, 99))
    axis.imshow(panel.image, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=panel.aspect)
    axis.set_title(panel.title, fontsize=size)
    axis.set_axis_off()
    if panel.prediction is not None:
        _contours(axis, panel.prediction)
    if panel.truth is not None:
        _contours(axis, panel.truth, dashed=True)


@contextmanager
def figure(size: tuple[float, float], title: str, path: Path) -> Iterator[Any]:
    """A matplotlib figure of ``size`` inches, written to ``path``; equal drawings give equal bytes.

    A path that ends in .png or .pdf is written as that, any other as both, its name continued by the ending.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(STYLE):
        sheet = plt.figure(figsize=size, layout="constrained")
        sheet.suptitle(textwrap.fill(title, int(14 * size[0])), fontsize=9)  # about 14 letters of this size an inch
        try:
            yield sheet
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in files_of(path):
                sheet.savefig(file, metadata=UNDATED[file.suffix])
        finally:
            plt.close(sheet)


def checked_path(path: Path) -> Path:
    """``path``, if its ending is one that `figure` writes; else a UsageError."""
    if path.suffix not in UNDATED:
        raise UsageError(f"The picture {path} would be a PNG or a PDF. Give a name that ends in .png or .pdf with -o.")
    return path


def files_of(path: Path) -> list[Path]:
    """The files that `figure` writes for a path."""
    return [path] if path.suffix in UNDATED else [path.with_name(path.name + ending) for ending in UNDATED]


def _class_lines(count: int) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], linewidth=1.6, **_look(number)) for number in range(1, count + 1)]


def _look(number: int) -> dict[str, Any]:
    """How the line of a class looks; more classes than colours begin again with another stroke."""
    turn, colour = divmod(number - 1, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": ("-", "-.", ":")[turn % 3]}


def _contours(axis: Any, mask: NDArray[Any], *, dashed: bool = False) -> None:
    """A line around each class: coloured, or white dashes that show on any brightness."""
    from matplotlib.patheffects import withStroke

    for number in np.unique(mask[(mask > 0) & (mask != NO_CLASS)]):
        layer = np.asarray(mask == number, dtype=float)
        if dashed:
            lines = axis.contour(layer, levels=[0.5], colors="white", linewidths=0.9, linestyles="dashed")
            lines.set_path_effects([withStroke(linewidth=1.9, foreground="black")])
        else:
            look = _look(int(number))
            axis.contour(layer, levels=[0.5], colors=look["color"], linestyles=look["linestyle"], linewidths=1.4)
