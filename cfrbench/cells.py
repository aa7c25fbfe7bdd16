"""One cell of a table. Importing this module does not import torch, so that `cfrbench status` answers at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One row group of the table: a method with or without guidance at one budget and seed."""

    ssl: str
    title: str
    variant: str  # baseline, cfr, pseudo-label
    labels: int
    unlabelled: int
    seed: int
    cases: int | None = None  # pseudo-label cells: only the first so many unlabelled cases; None = all
    fold: str = ""  # "2/5"; "" = the official split
    choice: str = ""  # seed of the choice of labelled cases; "" = the first of the list
    split: str = ""  # the first 12 digits of the hash of its lists

    @property
    def words(self) -> str:
        """``MT + CFR · 1 label · seed 0``, and fold and choice of labels where there are several."""
        name = f"{self.title} + CFR" if self.variant == "cfr" else self.title
        where = f" · fold {self.fold}" * bool(self.fold) + f" · choice {self.choice}" * bool(self.choice)
        return f"{name} · {self.labels} label{'s' if self.labels != 1 else ''} · seed {self.seed}{where}"
