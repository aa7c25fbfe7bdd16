"""The tables of the CFR paper as data: one number a row, each with the table it stands in.

Dice and Jaccard are percentages, ASD and 95HD are in voxels. Table III is here as far as the paper's text states it;
two values of Table IV are derived (column ``source`` says from what). The paper takes most baseline rows from the
methods' own reports, so they do not share one evaluation protocol; which case is the labelled one, and how many seeds
were run, it does not say.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

#: net -> how the paper's tables call a segmenter trained on labels alone: few labels = lower bound, all = upper bound
NET_TITLES = {"vnet": "V-Net", "unet3d": "3D U-Net"}
#: the fine-tuned SAM itself has one title in Table IX and another in Table X
TUNED_SAM = ("fine-tuned SAM (grid, LoRA)", "CFR (grid, LoRA)")


class PaperValue(NamedTuple):
    """A published number; ``unlabelled`` is None where its table does not state the count."""

    value: float
    labelled: int
    unlabelled: int | None
    table: int


@cache
def _table() -> pd.DataFrame:
    import pandas as pd  # 0.4 s, which neither help nor listings should pay

    with files(__package__).joinpath("published.csv").open(encoding="utf-8") as file:
        table = pd.read_csv(file, dtype={"unlabelled": "Int64"})
    return table.astype({"zero_marked": bool})


def published() -> pd.DataFrame:
    """Every number of the paper, one a row; the frame is the caller's own copy.

    Columns: table, dataset, setting, network, labelled, unlabelled (missing where not stated), method, variant, class,
    metric, value, zero_marked (the paper prints ``0*``: class never found), source.
    """
    return _table().copy()


def paper_value(
    dataset: str, ssl_title: str, variant: str, labelled: int, metric: str = "dice", *, net: str | None = None,
    class_name: str | None = None,
) -> PaperValue | None:  # fmt: skip
    """The paper's number for one cell, averaged over classes or of one class, or None if no table has it.

    ``ssl_title`` is a method's title or name ("MT" or "mt"); "supervised" means the paper's V-Net and 3D U-Net rows.
    For the variant "pseudo-label" it is ignored: those rows are the fine-tuned SAM. ``net`` restricts to one segmenter.
    """
    rows = _table()
    hits = rows[
        (rows["dataset"] == dataset)
        & (rows["variant"] == variant)
        & (rows["labelled"] == labelled)
        & (rows["metric"] == metric)
        & rows["class"].isin(("foreground", "mean") if class_name is None else (_as_printed(class_name),))
        & rows["method"].str.casefold().isin(_methods(ssl_title, variant))
    ]
    if net is not None and variant != "pseudo-label":
        hits = hits[hits["network"] == net]
    if hits.empty:
        return None
    # Table IX repeats numbers of other tables without the unlabelled count: prefer the row that states it.
    best = hits.sort_values("unlabelled", na_position="last", kind="stable").iloc[0]
    stated = hits["unlabelled"].notna().any()
    unlabelled = int(best["unlabelled"]) if stated else None
    return PaperValue(float(best["value"]), int(best["labelled"]), unlabelled, int(best["table"]))


def _as_printed(class_name: str) -> str:
    return class_name.strip().casefold().replace(" ", "_").replace("-", "_")


def _methods(ssl_title: str, variant: str) -> set[str]:
    if variant == "pseudo-label":
        return {title.casefold() for title in TUNED_SAM}
    if ssl_title.casefold() == "supervised":
        return {title.casefold() for title in NET_TITLES.values()}
    return {ssl_title.casefold()}
