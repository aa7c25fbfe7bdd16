"""Montages of an exhibit: cases chosen by rule, the slice on which the masks differ most, contours of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.errors import UsageError
from cfrbench.exhibits.planning import FINE_TUNED, labels_of
from cfrbench.exhibits.recipe import FigureSpec
from cfrbench.exhibits.running import Finished
from cfrbench.formats import read_labels
from cfrbench.recipes import STORED, Cell
from cfrbench.report import pictures
from cfrbench.report.pictures import Panel
from cfrbench.stages import StageWork
from cfrbench.store import Store

#: share of a structure's extent that is shown around it
MARGIN = 0.25
Masks = Mapping[str, NDArray[Any]]


def draw_predictions(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    """Truth, pseudo-label, and the prediction of each method, on the test cases of best, median and worst gain.

    The first budget and seed. The gain of a case is the mean over the guided methods. The pseudo-label of a test case
    is what the fine-tuned model says of it; no network has learned from it. UsageError without a finished pair.
    """
    labels, seed = one.part.config.labels[0], one.first_seed
    assert isinstance(labels, int)
    gains = pictures.gains_of_cases(one.result.cases, one.part.experiment.guided, labels, seed)
    cases = pictures.telling_cases(gains)
    masks: dict[str, Masks] = {}
    tuned = _tuned_labels(one, labels, seed, list(cases), compute)
    if tuned is not None:
        masks["pseudo-label"] = tuned
    for cell in one.cells(labels=labels, seed=seed):
        wanted = cell.ssl in spec.methods or not spec.methods
        if cell.unlabelled and cell.variant != "pseudo-label" and cell.ssl != FINE_TUNED and wanted:
            found = one.artifact("predict", cell)
            if found is not None:
                name = f"{cell.title} + CFR" if cell.variant == "cfr" else cell.title
                masks[name] = _arrays(found.path(STORED), cases)
    words = {case: f"{word} gain ({gains[case]:+.1f})\n{case}" for case, word in cases.items()}
    _draw(one, words, masks, f"{title}, {labels} labelled, seed {seed}; the truth dashed", path)


def draw_pseudo(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    """Truth and the pseudo-labels of each variant, on the unlabelled cases of best, median and worst gain.

    The first seed. The gain is that of the last variant over the first; of one variant alone its Dice counts.
    """
    cells = [cell for cell in one.cells(variant="pseudo-label", seed=one.first_seed) if one.artifact("pseudo", cell)]
    dice = one.result.cases.query("metric == 'dice' and variant == 'pseudo-label' and seed == @one.first_seed")
    by_case = dice.pivot_table(index="case", columns="title", values="value", aggfunc="mean", sort=False)
    cells = [cell for cell in cells if cell.title in by_case.columns]
    if not cells:
        raise UsageError("No pseudo-labels are finished.")
    values = by_case[cells[-1].title] - (by_case[cells[0].title] if len(cells) > 1 else 0)
    values = values.sort_values(kind="stable")
    cases = pictures.telling_cases(values)
    masks = {cell.title: _arrays(_pseudo(one, cell), cases) for cell in cells}
    word = "gain" if len(cells) > 1 else "Dice"
    sign = "+" if len(cells) > 1 else ""
    words = {case: f"{rank} {word} ({values[case]:{sign}.1f})\n{case}" for case, rank in cases.items()}
    what = "pseudo-labels of unlabelled cases; the truth dashed"
    _draw(one, words, masks, f"{title}, {cells[0].labels} labelled, seed {one.first_seed}: {what}", path)


def _pseudo(one: Finished, cell: Cell) -> Path:
    artifact = one.artifact("pseudo", cell)
    assert artifact is not None
    return artifact.path(STORED)


def _arrays(path: Path, cases: Mapping[str, str]) -> Masks:
    stored = read_labels(path)
    return {case: stored[case].numpy() for case in cases}


def _tuned_labels(one: Finished, labels: int, seed: int, cases: Sequence[str], compute: bool) -> Masks | None:
    """What the fine-tuned model says of test cases, kept in the store as pseudo-labels of its own.

    None without a finished fine-tuning, or if that is not in the store and ``compute`` does not allow it.
    """
    study, home = one.plan.study, Store(one.plan.store)
    if not one.part.experiment.guided or home.find("tune", study.tune(labels, seed).key) is None:
        return None
    own = labels_of(study, labels, seed, cases)
    if home.find("pseudo", own.key) is None and compute:
        StageWork(one.plan.store, study.config.data_root)(own)
    found = home.find("pseudo", own.key)
    return None if found is None else {case: mask.numpy() for case, mask in read_labels(found.path(STORED)).items()}


def _draw(one: Finished, words: Mapping[str, str], masks: Mapping[str, Masks], title: str, path: Path) -> None:
    """A row for each case: the truth alone, then each of ``masks`` with the truth dashed."""
    if not masks:
        raise UsageError("No masks of a finished cell are in the store.")
    rows = {}
    for case, name in words.items():
        volume = one.plan.study.source.load(case)
        if volume.label is None:
            raise UsageError(f"The case {case} has no label to draw.")
        truth, own = volume.label.numpy(), {label: found[case] for label, found in masks.items()}
        at = pictures.telling_slice(truth, list(own.values()))
        box = _frame([mask[:, :, at] for mask in (truth, *own.values())])
        image = volume.image.numpy()
        low, high = np.percentile(image, (1, 99))
        window = (float(low), float(high))
        shown = image[:, :, at][box].T
        first = Panel("truth", shown, None, truth[:, :, at][box].T, window)
        rest = [Panel(_titled(label, truth, mask), shown, truth[:, :, at][box].T, mask[:, :, at][box].T, window)
                for label, mask in own.items()]  # fmt: skip
        rows[f"{name}, slice {at}"] = [first, *rest]
    pictures.draw_montage(rows, title, path, one.plan.study.source.class_names[1:])


def _titled(label: str, truth: NDArray[Any], mask: NDArray[Any]) -> str:
    """The method, and the Dice of the whole volume: mean over the classes that are there."""
    dice = [2 * np.sum((truth == c) & (mask == c)) / (np.sum(truth == c) + np.sum(mask == c))
            for c in np.unique(truth[truth > 0])]  # fmt: skip
    return f"{label}\n{100 * float(np.mean(dice)):.1f}" if dice else label


def _frame(masks: Sequence[NDArray[Any]]) -> tuple[slice, slice]:
    """The square around all that is labelled in ``(H, W)`` masks, with a margin; everything if nothing is."""
    anything = np.any([mask > 0 for mask in masks], axis=0)
    if not anything.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(anything.any(axis=axis)) for axis in (1, 0)]
    side = int(max(span[-1] - span[0] + 1 for span in spans) * (1 + 2 * MARGIN))
    starts = [max(0, min((span[0] + span[-1] + 1 - side) // 2, length - side))
              for span, length in zip(spans, anything.shape, strict=True)]  # fmt: skip
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)
